// What a person sees and does. All work is worker.js's; here are the image of now, and what is shown of it.

import { blended, paddedBox, shownSize } from "./canvas.js";
import { drawCurve } from "./curve.js";
import { FITS, hex } from "./format.js";
import { MODELS } from "./models.js";

const $ = (id) => document.getElementById(id);
const FIRST_LENGTH = 8,
  FEW_TILES = 100;
const MOST_PIXELS = 2 ** 24; // of a canvas, on phones
const STRIP = [1, 2, 4, 8, 16, 32];
const PARTS = ["version, mode", "tokenizer", "entropy model", "tokens", "size", "geometry", "check", "payload"];

/**
 * The image of now: {name, model, source, seen, tiles, geometry, files, bits, squares, shown}.
 *
 * source is what was opened, to make it again by another model or fit, and seen what the model sees of it,
 * {width, height, pixels, box}; both null for a file. tiles are lists of tokens, one where there are no tiles. files[n]
 * has n + 1 tokens a tile, squares[n] what they decode to, tile by tile, and shown[n] their image where it is complete.
 */
let image = null;
/** What is being opened, as `open` has it; null when it is shown or could not be. A later one takes its place. */
let pending = null;
let model = MODELS[0].name;
let length = FIRST_LENGTH,
  wantedLength = FIRST_LENGTH; // shown, and asked for: an image may have fewer

// ------------------------------------------------------------------------------------------------ the worker

const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map();
let calls = 0;

/** What the worker makes of something; how far it is shows while `own` is what is being opened. */
function call(action, given, own) {
  const id = ++calls;
  worker.postMessage({ id, action, ...given });
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject, own }));
}

worker.onmessage = ({ data: { id, result, error, progress } }) => {
  if (progress) {
    if (pending && waiting.get(id)?.own === pending) showProgress(progress);
    return;
  }
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error) reject(new Error(error));
  else resolve(result);
};
worker.onerror = () =>
  say(
    "The page's second half could not start: it needs a browser of 2023 or later, and a web server, even a simple one.",
  );

// ------------------------------------------------------------------------------------------------ opening

/**
 * Open what a person gave, {blob, name, isExample, isLink}: an image, or a .1dp file; or what was opened before.
 *
 * The blob may be a promise. What is opened later takes its place, and nothing of this one shows any more.
 */
async function open(given) {
  const own = (pending = { ...given });
  say("");
  showBusy(true);
  try {
    const next = await opened(own);
    if (own !== pending) return;
    const isOfAnother = location.hash && !own.isLink; // the link in the address
    if (isOfAnother) history.replaceState(null, "", location.pathname + location.search);
    if (own.isFile) selectModel(next.model);
    start(next);
    if (next.isCut) say(`The file is cut: ${own.bytes} bytes of it are here. Shown is what is certain.`, true);
  } catch (error) {
    if (own === pending) say(error.message);
  } finally {
    if (own === pending) pending = null;
    showDecoding();
  }
}

/** A new image of now. A .1dp file is told by its first bytes, or its name. */
async function opened(own) {
  if (!own.image) {
    const blob = await own.blob;
    own.bytes = blob.size;
    const head = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
    own.isFile = own.name.endsWith(".1dp") || (head[0] === 0x1d && head[1] >> 4 === 5);
    if (own.isFile) {
      const bytes = new Uint8Array(await blob.arrayBuffer());
      return { ...(await call("open", { bytes }, own)), name: own.name, source: null, seen: null };
    }
    Object.assign(own, await pixelsOf(blob, own.name));
  }
  const fit = Number($("fit").value),
    now = model,
    { name, image: pixels, size } = own;
  const made = await call("encode", { model: now, image: pixels, size, fit }, own);
  return { ...made, name, model: now, fit, source: own };
}

async function pixelsOf(blob, name) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(blob, options).catch(() => {
    throw new Error(
      `${name} is no image that this browser can read: give a PNG, JPEG, WebP, GIF or AVIF image, or a .1dp file.`,
    );
  });
  const { width, height } = bitmap;
  if (Math.max(width, height) > 65535 || width * height > 2 ** 26) {
    throw new Error(
      `A .1dp file holds images of at most 65,535 pixels a side and ${(2 ** 26).toLocaleString("en")} in all; this one has ${width} × ${height}. Scale it down first.`,
    );
  }
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (width * height)));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height].map((side) => Math.max(1, Math.floor(side * scale)));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  return { image: { width: canvas.width, height: canvas.height, data }, size: { width, height } };
}

/** Show a new image, and decode it at all lengths, the wanted one first; tiles, which take seconds, at a few. */
function start(next) {
  image = { ...next, squares: [], shown: [] };
  const most = image.files.length,
    few = STRIP.filter((n) => n <= most);
  length = image.source ? Math.min(wantedLength, most) : most; // a file is shown as it is
  image.order =
    image.tiles.length === 1
      ? [...few, ...image.files.map((_, k) => k + 1)]
      : image.tiles.length <= FEW_TILES
        ? few
        : [];
  buildDial(most);
  show();
  decodeAll(image);
}

/** Square after square, until all is decoded or another image is shown; every time what is wanted most. */
async function decodeAll(now) {
  now.isDecoding = true;
  showDecoding();
  while (now === image) {
    const wanted = [length, ...now.order].find((n) => !now.shown[n - 1]);
    if (!wanted) break;
    const squares = (now.squares[wanted - 1] ??= []),
      tokens = now.tiles[squares.length].slice(0, wanted);
    try {
      squares.push(tokens.length ? await call("decode", { model: now.model, tokens }) : null);
    } catch (error) {
      say(error.message);
      break;
    }
    if (now !== image) break;
    const isWhole = squares.length === now.tiles.length;
    if (isWhole) now.shown[wanted - 1] = shownOf(now, squares);
    if (isWhole) showDecoded(wanted);
    else if (wanted === length) showPart(now, squares);
  }
  now.isDecoding = false;
  showDecoding();
}

/** The image of its squares, and its PSNR where there is an original. */
function shownOf({ geometry, seen }, squares) {
  const side = Math.sqrt(squares.find(Boolean).length / 3);
  const shown = geometry?.tiles ? blended(squares, geometry, side) : { width: side, height: side, pixels: squares[0] };
  return seen ? { ...shown, psnr: psnrOf(seen, shown) } : shown;
}

/** In dB, where the image lies in its square. */
function psnrOf({ width, pixels, box }, shown) {
  const [left, top, right, bottom] = box;
  let sum = 0;
  for (let row = top; row < bottom; row++) {
    for (let place = 3 * (row * width + left); place < 3 * (row * width + right); place++)
      sum += (pixels[place] - shown.pixels[place]) ** 2;
  }
  return 10 * Math.log10((255 ** 2 * areaOf(box) * 3) / sum);
}

const areaOf = ([left, top, right, bottom]) => (right - left) * (bottom - top);

/** Where an image of a file lies in what is decoded. */
function boxOf({ geometry, side }) {
  if (geometry?.tiles) return [0, 0, ...shownSize(geometry)];
  return geometry && FITS[geometry.fit] === "pad" ? paddedBox(...shownSize(geometry), side) : [0, 0, side, side];
}

// ------------------------------------------------------------------------------------------------ showing

function say(text, isNote = false) {
  $("message").textContent = text;
  $("message").hidden = !text;
  $("message").classList.toggle("note", isNote);
}

function showBusy(isBusy, text = "Encoding") {
  $("loading").hidden = !isBusy;
  if (!isBusy) return;
  $("loading").querySelector("p").textContent = text;
  $("loading").querySelector("progress").removeAttribute("value");
}

/** Whether the image of now is still to be decoded, unless something is being opened: that shows. */
function showDecoding() {
  if (!pending) showBusy(Boolean(image?.isDecoding && !image.shown[length - 1]), "Decoding");
}

function showProgress({ size, total, doing }) {
  const megabytes = (count) => (count / 1e6).toFixed(1);
  const far =
    total < 1e5 && total
      ? `tile ${size + 1} of ${total}`
      : `${megabytes(size)}${total ? ` of ${megabytes(total)}` : ""} MB`;
  showBusy(true, `${doing}: ${far}`);
  if (total) $("loading").querySelector("progress").value = size / total;
}

/** What there is of an image of tiles, now and then. */
function showPart(now, squares) {
  if (!pending) showProgress({ size: squares.length, total: now.tiles.length, doing: "Decoding" });
  if (squares.length % now.geometry.tiles.columns === 0 && squares.some(Boolean))
    draw($("shown"), shownOf({ geometry: now.geometry }, squares));
}

function draw(canvas, { width, height, pixels }) {
  [canvas.width, canvas.height] = [width, height];
  const data = new ImageData(width, height);
  for (let from = 0, to = 0; from < pixels.length; from += 3, to += 4) {
    for (let colour = 0; colour < 3; colour++) data.data[to + colour] = pixels[from + colour];
    data.data[to + 3] = 255;
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
}

/** All of a new image that does not depend on the length, then what does. */
function show() {
  const { source, seen, geometry } = image;
  $("original").hidden = !seen;
  $("no-original").hidden = Boolean(seen);
  if (seen) draw($("original"), seen);
  $("fit").disabled = !source;
  const { width, height } = source?.size ?? {};
  $("original-caption").textContent = source
    ? `${width} × ${height}${seen.width === width ? "" : ` seen at ${seen.width} × ${seen.height}`}, ${bytesOf(source.bytes)}`
    : image.name;
  for (const button of $("examples").children)
    button.setAttribute("aria-pressed", String(button.dataset.name === (source?.isExample && image.name)));
  showLength();
}

const bytesOf = (count) =>
  count < 10000
    ? `${count.toLocaleString("en")} bytes`
    : `${(count / 1000).toLocaleString("en", { maximumFractionDigits: 0 })} kB`;

function buildDial(most) {
  $("slider").max = most;
  $("slider").value = length;
  document.querySelector(".dial").style.setProperty("--count", most);
  $("count-of").textContent = `of ${most}${image.geometry?.tiles ? " a tile" : ""}`;
  const highest = Math.max(...image.bits),
    isTiled = image.tiles.length > 1;
  $("bars").replaceChildren(
    ...image.bits.map((bits, place) => {
      const bar = document.createElement("i"),
        what = isTiled ? "of all tiles on average" : `is code ${image.tiles[0][place]}`;
      bar.style.height = `${(100 * bits) / highest}%`;
      bar.title = `token ${place + 1} ${what}: ${bits.toFixed(1)} bits`;
      return bar;
    }),
  );
  $("strip").replaceChildren(
    ...STRIP.filter((n) => image.order.includes(n)).map((n) => {
      const button = document.createElement("button"),
        canvas = document.createElement("canvas");
      button.type = "button";
      button.dataset.length = n;
      button.append(canvas, String(n));
      button.setAttribute("aria-label", n === 1 ? "1 token" : `${n} tokens`);
      button.onclick = () => setLength(n);
      return button;
    }),
  );
}

function setLength(value) {
  if (!image || value === length) return;
  length = wantedLength = value;
  $("slider").value = value;
  showLength();
  if (image.isDecoding) showDecoding();
  else decodeAll(image);
}

/** What depends on the length alone, and its image where it is decoded. */
function showLength() {
  const most = image.files.length;
  $("count").textContent = length;
  $("count-unit").textContent = length === 1 ? "token" : "tokens";
  $("slider").style.setProperty("--filled", `${(100 * (length - 0.5)) / most}%`);
  [...$("bars").children].forEach((bar, place) => {
    const hue = image.tiles.length > 1 ? 249 : (image.tiles[0][place] * 137.5) % 360;
    bar.style.background = place < length ? `hsl(${hue} 62% var(--token))` : "";
  });
  for (const button of $("strip").children)
    button.setAttribute("aria-pressed", String(Number(button.dataset.length) === length));
  showFile();
  if (image.shown[length - 1]) showDecoded(length);
}

/** An image that was decoded: in the strip, on the curve, and large where it is the one of now. */
function showDecoded(decoded) {
  const shown = image.shown[decoded - 1],
    button = $("strip").querySelector(`[data-length="${decoded}"]`);
  if (button && !button.dataset.isDrawn) draw(button.querySelector("canvas"), shown);
  if (button) button.dataset.isDrawn = "yes";
  if (decoded === length) {
    draw($("shown"), shown);
    Object.assign($("shown").dataset, { tokens: length, name: image.name, fit: FITS[image.fit] ?? "" });
    $("shown-caption").textContent = `${length} of ${image.files.length} tokens`;
    $("psnr").textContent = shown.psnr === undefined ? "–" : shown.psnr.toFixed(2);
    showFile();
    showDecoding();
  }
  showCurve();
}

function showFile() {
  const file = image.files[length - 1],
    { seen, geometry } = image;
  for (const id of ["save", "link"]) $(id).disabled = !file;
  $("save-image").disabled = !image.shown[length - 1];
  if (!file) {
    for (const id of ["size", "rate", "ratio"]) $(id).textContent = "–";
    $("bytes").textContent = "";
    return;
  }
  const size = file.bytes.length,
    area = areaOf(seen?.box ?? boxOf(image));
  $("size").textContent = size.toLocaleString("en");
  $("rate").textContent = ((8 * size) / area).toFixed(3);
  $("ratio").textContent = `${((3 * area) / size).toFixed(0)} ×`;
  showBytes(file);
}

/** The file in hexadecimal, each part in its colour. */
function showBytes({ bytes, parts, mode }) {
  const pieces = [],
    legend = [];
  let place = 0;
  for (const [name, size] of parts) {
    const hue = (PARTS.indexOf(name) * 47 + 20) % 360,
      span = document.createElement("span");
    span.textContent =
      hex(bytes.subarray(place, place + Math.min(size, 2000))).replace(/..(?!$)/g, "$& ") + (size > 2000 ? " …" : "");
    const item = document.createElement("li"),
      swatch = document.createElement("i");
    for (const element of [span, item]) element.dataset.part = name;
    for (const element of [span, swatch]) element.style.setProperty("--hue", hue);
    item.append(
      swatch,
      name === "payload"
        ? `payload: the tokens, by ${{ fixed: "fixed bits", tables: "tables", network: "a small network" }[mode]}`
        : name,
    );
    if (size) pieces.push(span, " ");
    if (size) legend.push(item);
    place += size;
  }
  $("bytes").replaceChildren(...pieces);
  $("legend").replaceChildren(...legend);
}

/** PSNR by bytes, of what is decoded. */
function showCurve() {
  const { files, shown, seen } = image;
  $("curve").parentElement.hidden = !seen;
  if (!seen) return;
  const points = shown
    .map(({ psnr }, place) => ({ bytes: files[place].bytes.length, psnr, isHere: place + 1 === length }))
    .filter(({ psnr }) => Number.isFinite(psnr)); // also what is not decoded yet
  drawCurve($("curve"), points, files[0].bytes.length, files.at(-1).bytes.length);
}

// ------------------------------------------------------------------------------------------------ saving

function save(blob, name) {
  const link = document.createElement("a"),
    url = URL.createObjectURL(blob);
  [link.href, link.download] = [url, name];
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

const stem = () => image.name.replace(/\.[^.]*$/, "") || "image";

/** The image as decompressing gives it: what is in the square of the image, in its original size. */
function saveImage() {
  const { geometry } = image,
    shown = $("shown"),
    canvas = document.createElement("canvas");
  const box = boxOf({ geometry, side: shown.width });
  [canvas.width, canvas.height] = [shown.width, shown.height];
  if (geometry && !geometry.tiles) {
    const [width, height] = shownSize(geometry),
      fit = FITS[geometry.fit],
      shorter = Math.min(width, height);
    const [across, down] = fit === "crop" ? [shorter, shorter] : [width, height];
    const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (across * down)));
    [canvas.width, canvas.height] = [across, down].map((side) => Math.max(1, Math.floor(side * scale)));
  }
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(shown, box[0], box[1], box[2] - box[0], box[3] - box[1], 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) =>
    blob
      ? save(blob, `${stem()}_${length}.png`)
      : say(`This browser cannot make an image of ${canvas.width} × ${canvas.height} pixels.`),
  );
}

const toAddress = (bytes) =>
  btoa(String.fromCharCode(...bytes))
    .replaceAll("+", "-")
    .replaceAll("/", "_")
    .replace(/=+$/, "");
const fromAddress = (text) =>
  Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (letter) => letter.charCodeAt(0));

/** The file as a link: it is short enough. */
async function copyLink() {
  const { bytes } = image.files[length - 1];
  if (bytes.length > 2000)
    return say(`A link holds up to 2,000 bytes, and this file has ${bytes.length.toLocaleString("en")}: save it.`);
  history.replaceState(null, "", `#${toAddress(bytes)}`);
  const copied = await navigator.clipboard?.writeText(location.href).then(
    () => true,
    () => false,
  );
  say(copied ? `Copied: ${location.href}` : `The address of this page now has the image in it: ${location.href}`, true);
}

function openAddress() {
  const text = location.hash.slice(1);
  if (!text) return false;
  try {
    open({ blob: new Blob([fromAddress(text)]), name: "from the link.1dp", isLink: true });
  } catch {
    say("The link is damaged: what is behind # is no .1dp file.");
  }
  return true;
}

// ------------------------------------------------------------------------------------------------ hands

function selectModel(name) {
  model = name;
  document.querySelector(`#models [value="${name}"]`).checked = true;
  const { label, knows, examples, images } = MODELS.find((one) => one.name === name);
  $("knows").textContent =
    `The model “${label}” knows ${knows}, 32 × 32 pixels, and nothing else: of another image it makes what it knows.`;
  if ($("examples").dataset.model === name) return;
  $("examples").dataset.model = name;
  $("examples").replaceChildren(
    ...images.map((title) => {
      const button = document.createElement("button"),
        picture = document.createElement("img");
      button.type = "button";
      button.setAttribute("aria-label", title.replaceAll("_", " "));
      Object.assign(picture, { src: `${examples}${title}.png`, alt: "", width: 44, height: 44 });
      button.dataset.name = `${title}.png`;
      button.append(picture);
      button.onclick = () => openExample(`${examples}${title}.png`);
      return button;
    }),
  );
}

const openOwn = (file) => open({ blob: file, name: file.name });

function openExample(path) {
  open({ blob: fetched(path), name: path.split("/").at(-1), isExample: true });
}

async function fetched(path) {
  const response = await fetch(path).catch(() => null);
  if (!response?.ok) throw new Error(`${path} could not be fetched.`);
  return response.blob();
}

/** What a change of model or fit is for: what is being opened, or else what is shown. */
const current = () => pending ?? image?.source;

function again() {
  if (current()) open(current());
}

function setUp() {
  for (const { name, label } of MODELS) {
    const choice = document.createElement("label"),
      input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "model", value: name });
    input.onchange = () => {
      const { examples, images } = MODELS.find((one) => one.name === name);
      const given = current();
      selectModel(name);
      if (given && !given.isExample && !given.isFile) again();
      else openExample(`${examples}${images[0]}.png`);
    };
    choice.append(input, label);
    $("models").append(choice);
  }
  $("choose").onclick = () => $("chooser").click();
  $("chooser").onchange = ({ target }) => {
    if (target.files[0]) openOwn(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  };
  $("slider").oninput = ({ target }) => setLength(Number(target.value));
  $("fit").onchange = again;
  $("smooth").onchange = ({ target }) => document.body.classList.toggle("smooth", target.checked);
  $("save").onclick = () => save(new Blob([image.files[length - 1].bytes]), `${stem()}.1dp`);
  $("save-image").onclick = saveImage;
  $("link").onclick = copyLink;
  $("bars").onpointerdown = $("bars").onpointermove = (event) => {
    const { left, width } = $("bars").getBoundingClientRect();
    if (event.buttons)
      setLength(
        Math.min(image.files.length, Math.max(1, Math.ceil((image.files.length * (event.clientX - left)) / width))),
      );
  };
  document.ondragover = (event) => {
    event.preventDefault();
    $("drop").hidden = false;
  };
  document.ondragleave = ({ relatedTarget }) => ($("drop").hidden = !relatedTarget);
  document.ondrop = (event) => {
    event.preventDefault();
    $("drop").hidden = true;
    const [file] = event.dataTransfer.files;
    if (file) openOwn(file);
  };
  document.onpaste = ({ clipboardData }) => clipboardData.files[0] && openOwn(clipboardData.files[0]);
  window.onhashchange = openAddress;
}

setUp();
selectModel(model);
if (!openAddress()) openExample(`${MODELS[0].examples}${MODELS[0].images[0]}.png`);
