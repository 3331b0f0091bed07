// What a person sees and does. All work is worker.js's; here are the image of now, and what is shown of it.

import { paddedBox, shownSize } from "./canvas.js";
import { FITS, hex } from "./format.js";
import { MODELS } from "./models.js";

const $ = (id) => document.getElementById(id);
const FIRST_LENGTH = 8, MOST_PIXELS = 2 ** 24; // of a canvas, on phones
const STRIP = [1, 2, 4, 8, 16, 32];
const PARTS = ["version, mode", "tokenizer", "entropy model", "tokens", "size", "geometry", "check", "payload"];

/**
 * The image of now: {name, source, original, tiles, geometry, files, bits, shown}.
 *
 * source is what it was made of, to make it again by another model or fit; original the square {width, height, pixels,
 * box}, null for a file; files[n - 1] and shown[n - 1] are of n tokens, as far as they are known.
 */
let image = null;
let model = MODELS[0].name, length = FIRST_LENGTH;

// ------------------------------------------------------------------------------------------------ the worker

const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map();
let calls = 0;

function call(action, given) {
  const id = ++calls;
  worker.postMessage({ id, action, ...given });
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
}

worker.onmessage = ({ data: { id, result, error, progress } }) => {
  if (progress) return showProgress(progress);
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error) reject(new Error(error));
  else resolve(result);
};
worker.onerror = () => say("The page's second half could not start: it needs a browser of 2023 or later, and a web server, even a simple one.");

// ------------------------------------------------------------------------------------------------ opening

/** Open what a person gave: an image, or a .1dp file, told by its first bytes. */
async function open(blob, name, isExample = false) {
  const head = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
  if (name.endsWith(".1dp") || (head[0] === 0x1d && head[1] >> 4 === 5)) return openFile(new Uint8Array(await blob.arrayBuffer()), name);
  return attempt(async () => openImage({ ...(await pixelsOf(blob, name)), name, bytes: blob.size, isExample }));
}

async function openImage(source) {
  const given = { model, image: source.image, size: source.size, fit: Number($("fit").value) };
  const { square, box, ...result } = await call("encode", given);
  const side = Math.sqrt(square.length / 3);
  start({ ...result, fit: given.fit, name: source.name, source, original: { width: side, height: side, pixels: square, box } });
}

function openFile(bytes, name) {
  return attempt(async () => {
    const { model: written, ...result } = await call("open", { bytes });
    selectModel(written);
    start({ ...result, name, source: null, original: null });
    if (result.isCut) say(`The file is cut: ${bytes.length} bytes of it are here. Shown is what is certain.`, true);
  });
}

/** Do something that may fail, and say so. Where something else was begun meanwhile, nothing is said. */
async function attempt(doing) {
  const before = ++attempts;
  say("");
  showBusy(true);
  try {
    await doing();
  } catch (error) {
    if (before === attempts) say(error.message);
  }
  if (before === attempts) showBusy(false);
}
let attempts = 0;

async function pixelsOf(blob, name) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(blob, options).catch(() => {
    throw new Error(`${name} is no image that this browser can read: give a PNG, JPEG, WebP, GIF or AVIF image, or a .1dp file.`);
  });
  const { width, height } = bitmap;
  if (Math.max(width, height) > 65535 || width * height > 2 ** 26) {
    throw new Error(`A .1dp file holds images of at most 65,535 pixels a side and ${(2 ** 26).toLocaleString("en")} in all; this one has ${width} × ${height}. Scale it down first.`);
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

/** Show a new image, and decode all lengths of it: the wanted one first, then those of the strip. */
function start(next) {
  image = { ...next, shown: [] };
  const most = total();
  length = Math.min(length, most);
  const isCoarse = Boolean(image.geometry?.tiles); // decoding takes seconds: only what is asked for
  const order = isCoarse ? [] : [...new Set([...STRIP.filter((n) => n <= most), ...Array.from({ length: most }, (_, k) => k + 1)])];
  buildDial(most);
  show();
  decodeAll(image, order);
}

const total = () => image.tiles.reduce((most, tokens) => Math.max(most, tokens.length), 0);

async function decodeAll(now, order) {
  now.isDecoding = true;
  while (now === image) {
    const next = now.shown[length - 1] ? order.find((n) => !now.shown[n - 1]) : length;
    if (next === undefined) break;
    try {
      const { file, ...shown } = await call("decode", { model, tiles: now.tiles, length: next, geometry: now.geometry });
      now.shown[next - 1] = shown;
      if (file !== undefined) now.files[next - 1] = file;
      if (now.original) shown.psnr = psnrOf(now.original, shown);
      if (now === image) showDecoded(next);
    } catch (error) {
      return say(error.message);
    }
  }
  now.isDecoding = false;
  if (now === image) showBusy(false);
}

/** In dB, where the image lies in its square. */
function psnrOf({ width, pixels, box: [left, top, right, bottom] }, shown) {
  let sum = 0;
  for (let row = top; row < bottom; row++) {
    for (let place = 3 * (row * width + left); place < 3 * (row * width + right); place++) sum += (pixels[place] - shown.pixels[place]) ** 2;
  }
  return 10 * Math.log10((255 ** 2 * areaOf({ box: [left, top, right, bottom] }) * 3) / sum);
}

const areaOf = ({ box: [left, top, right, bottom] }) => (right - left) * (bottom - top);

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

function showProgress({ size, total: whole }) {
  const isModel = whole > 1e5 || !whole;
  showBusy(true, isModel ? `Fetching the model: ${(size / 1e6).toFixed(1)}${whole ? ` of ${(whole / 1e6).toFixed(1)}` : ""} MB` : `Decoding tile ${size + 1} of ${whole}`);
  if (whole) $("loading").querySelector("progress").value = size / whole;
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
  const { source, original, geometry } = image;
  $("original").hidden = !original;
  $("no-original").hidden = Boolean(original);
  if (original) draw($("original"), original);
  const [width, height] = source ? [source.size.width, source.size.height] : geometry ? shownSize(geometry) : [32, 32];
  $("original-caption").textContent = source ? `${width} × ${height}${geometry ? " seen at 32 × 32" : ""}, ${bytesOf(source.bytes)}` : image.name;
  for (const button of $("examples").children) button.setAttribute("aria-pressed", String(button.dataset.name === (source?.isExample && image.name)));
  showLength();
}

const bytesOf = (count) => (count < 10000 ? `${count.toLocaleString("en")} bytes` : `${(count / 1000).toLocaleString("en", { maximumFractionDigits: 0 })} kB`);

function buildDial(most) {
  $("slider").max = most;
  $("slider").value = length;
  document.querySelector(".dial").style.setProperty("--count", most);
  $("count-of").textContent = `of ${most}${image.geometry?.tiles ? " a tile" : ""}`;
  const highest = Math.max(...(image.bits ?? [1]));
  $("bars").hidden = $("bars-hint").hidden = !image.bits;
  $("bars").replaceChildren(...(image.bits ?? []).map((bits, place) => {
    const bar = document.createElement("i");
    bar.style.height = `${(100 * bits) / highest}%`;
    bar.title = `token ${place + 1} is code ${image.tiles[0][place]}: ${bits.toFixed(1)} bits`;
    return bar;
  }));
  $("strip").replaceChildren(...STRIP.filter((n) => n <= most && image.bits).map((n) => {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    button.type = "button";
    button.dataset.length = n;
    button.append(canvas, n === 1 ? "1 token" : `${n}`);
    button.setAttribute("aria-label", `${n} tokens`);
    button.onclick = () => setLength(n);
    return button;
  }));
}

function setLength(value) {
  if (!image || value === length) return;
  length = value;
  $("slider").value = value;
  showLength();
  if (!image.isDecoding && !image.shown[length - 1]) decodeAll(image, []);
}

/** What depends on the length alone, and its image where it is decoded. */
function showLength() {
  const most = total();
  $("count").textContent = length;
  $("count-unit").textContent = length === 1 ? "token" : "tokens";
  $("slider").style.setProperty("--filled", `${(100 * (length - 0.5)) / most}%`);
  [...$("bars").children].forEach((bar, place) => {
    bar.style.background = place < length ? `hsl(${(image.tiles[0][place] * 137.5) % 360} 62% var(--token))` : "";
  });
  for (const button of $("strip").children) button.setAttribute("aria-pressed", String(Number(button.dataset.length) === length));
  showFile();
  if (image.shown[length - 1]) showDecoded(length);
  else showBusy(true, "Decoding");
}

/** An image that was decoded: in the strip, on the curve, and large where it is the one of now. */
function showDecoded(decoded) {
  const shown = image.shown[decoded - 1], button = $("strip").querySelector(`[data-length="${decoded}"]`);
  if (button && !button.dataset.isDrawn) draw(button.querySelector("canvas"), shown);
  if (button) button.dataset.isDrawn = "yes";
  if (decoded === length) {
    draw($("shown"), shown);
    Object.assign($("shown").dataset, { tokens: length, name: image.name, fit: image.source ? FITS[image.fit] : "" });
    $("shown-caption").textContent = `${length} of ${total()} tokens`;
    $("psnr").textContent = shown.psnr === undefined ? "–" : shown.psnr.toFixed(2);
    showBusy(false);
    showFile();
  }
  showCurve();
}

function showFile() {
  const file = image.files[length - 1], { original, geometry } = image;
  for (const id of ["save", "link"]) $(id).disabled = !file;
  $("save-image").disabled = !image.shown[length - 1];
  if (!file) {
    for (const id of ["size", "rate", "ratio"]) $(id).textContent = "–";
    $("bytes").textContent = "";
    return;
  }
  const size = file.bytes.length, [width, height] = geometry?.tiles ? shownSize(geometry) : [32, 32];
  const area = original ? areaOf(original) : geometry?.fit === 1 ? areaOf({ box: paddedBox(...shownSize(geometry), 32) }) : width * height;
  $("size").textContent = size.toLocaleString("en");
  $("rate").textContent = ((8 * size) / area).toFixed(3);
  $("ratio").textContent = `${((3 * area) / size).toFixed(0)} ×`;
  showBytes(file);
}

/** The file in hexadecimal, each part in its colour. */
function showBytes({ bytes, parts, mode }) {
  const pieces = [], legend = [];
  let place = 0;
  for (const [name, size] of parts) {
    const hue = (PARTS.indexOf(name) * 47 + 20) % 360, span = document.createElement("span");
    span.textContent = hex(bytes.subarray(place, place + Math.min(size, 2000))).replace(/..(?!$)/g, "$& ") + (size > 2000 ? " …" : "");
    const item = document.createElement("li"), swatch = document.createElement("i");
    for (const element of [span, item]) element.dataset.part = name;
    for (const element of [span, swatch]) element.style.setProperty("--hue", hue);
    item.append(swatch, name === "payload" ? `payload: the tokens, by ${{ fixed: "fixed bits", tables: "tables", network: "a small network" }[mode]}` : name);
    if (size) pieces.push(span, " ");
    if (size) legend.push(item);
    place += size;
  }
  $("bytes").replaceChildren(...pieces);
  $("legend").replaceChildren(...legend);
}

/** PSNR by bytes, of what is decoded. */
function showCurve() {
  const { files, shown, original } = image, svg = $("curve");
  svg.parentElement.hidden = !original;
  if (!original) return;
  const points = shown.map((one, k) => one && [files[k].bytes.length, one.psnr, k + 1]).filter((point) => point && Number.isFinite(point[1]));
  if (!points.length) return svg.replaceChildren();
  const highest = Math.ceil(Math.max(...points.map(([, psnr]) => psnr)) + 0.5), lowest = Math.floor(Math.min(...points.map(([, psnr]) => psnr)) - 0.5);
  const widest = files.at(-1).bytes.length, narrowest = files[0].bytes.length;
  const x = (bytes) => 30 + (260 * (bytes - narrowest)) / Math.max(1, widest - narrowest);
  const y = (psnr) => 122 - (110 * (psnr - lowest)) / (highest - lowest);
  const line = points.map(([bytes, psnr], k) => `${k ? "L" : "M"}${x(bytes).toFixed(1)} ${y(psnr).toFixed(1)}`).join("");
  const elements = [lowest, highest].flatMap((psnr) => [
    make("line", { x1: 30, x2: 290, y1: y(psnr), y2: y(psnr) }), make("text", { x: 25, y: y(psnr) + 3, "text-anchor": "end" }, psnr),
  ]);
  elements.push(make("text", { x: 30, y: 138, "text-anchor": "middle" }, narrowest), make("text", { x: 290, y: 138, "text-anchor": "middle" }, widest));
  elements.push(make("text", { x: 160, y: 138, "text-anchor": "middle" }, "bytes"), make("text", { x: 25, y: 67, "text-anchor": "end" }, "dB"), make("path", { d: line }));
  const here = points.find(([, , n]) => n === length);
  if (here) elements.push(make("circle", { cx: x(here[0]), cy: y(here[1]), r: 6 }));
  svg.replaceChildren(...elements);
}

function make(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

// ------------------------------------------------------------------------------------------------ saving

function save(blob, name) {
  const link = document.createElement("a"), url = URL.createObjectURL(blob);
  [link.href, link.download] = [url, name];
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

const stem = () => image.name.replace(/\.[^.]*$/, "") || "image";

/** The image as decompressing gives it: what is in the square of the image, in its original size. */
function saveImage() {
  const { geometry } = image, shown = $("shown"), canvas = document.createElement("canvas");
  let box = [0, 0, shown.width, shown.height];
  [canvas.width, canvas.height] = [shown.width, shown.height];
  if (geometry && !geometry.tiles) {
    const [width, height] = shownSize(geometry), fit = FITS[geometry.fit], shorter = Math.min(width, height);
    if (fit === "pad") box = paddedBox(width, height, shown.width);
    const [across, down] = fit === "crop" ? [shorter, shorter] : [width, height];
    const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (across * down)));
    [canvas.width, canvas.height] = [across, down].map((side) => Math.max(1, Math.floor(side * scale)));
  }
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(shown, box[0], box[1], box[2] - box[0], box[3] - box[1], 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => (blob ? save(blob, `${stem()}_${length}.png`) : say(`This browser cannot make an image of ${canvas.width} × ${canvas.height} pixels.`)));
}

const toAddress = (bytes) => btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
const fromAddress = (text) => Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (letter) => letter.charCodeAt(0));

/** The file as a link: it is short enough. */
async function copyLink() {
  const { bytes } = image.files[length - 1];
  if (bytes.length > 2000) return say(`A link holds up to 2,000 bytes, and this file has ${bytes.length.toLocaleString("en")}: save it.`);
  history.replaceState(null, "", `#${toAddress(bytes)}`);
  const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
  say(copied ? `Copied: ${location.href}` : `The address of this page now has the image in it: ${location.href}`, true);
}

function openAddress() {
  const text = location.hash.slice(1);
  if (!text) return false;
  try {
    openFile(fromAddress(text), "from the link.1dp");
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
  $("knows").textContent = `The model “${label}” knows ${knows}, 32 × 32 pixels, and nothing else: of another image it makes what it knows.`;
  if ($("examples").dataset.model === name) return;
  $("examples").dataset.model = name;
  $("examples").replaceChildren(...images.map((title) => {
    const button = document.createElement("button"), picture = document.createElement("img");
    button.type = "button";
    button.setAttribute("aria-label", title.replaceAll("_", " "));
    Object.assign(picture, { src: `${examples}${title}.png`, alt: "", width: 44, height: 44 });
    button.dataset.name = `${title}.png`;
    button.append(picture);
    button.onclick = () => openExample(`${examples}${title}.png`);
    return button;
  }));
}

async function openExample(path) {
  const response = await fetch(path).catch(() => null);
  if (!response?.ok) return say(`${path} could not be fetched.`);
  return open(await response.blob(), path.split("/").at(-1), true);
}

function again() {
  if (image?.source) attempt(() => openImage(image.source));
}

function setUp() {
  for (const { name, label } of MODELS) {
    const choice = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "model", value: name });
    input.onchange = () => {
      const { examples, images } = MODELS.find((one) => one.name === name);
      const isOwn = image?.source && !image.source.isExample;
      selectModel(name);
      if (isOwn) again();
      else openExample(`${examples}${images[0]}.png`);
    };
    choice.append(input, label);
    $("models").append(choice);
  }
  $("choose").onclick = () => $("chooser").click();
  $("chooser").onchange = ({ target }) => {
    if (target.files[0]) open(target.files[0], target.files[0].name);
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
    if (event.buttons) setLength(Math.min(total(), Math.max(1, Math.ceil((total() * (event.clientX - left)) / width))));
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
    if (file) open(file, file.name);
  };
  document.onpaste = ({ clipboardData }) => clipboardData.files[0] && open(clipboardData.files[0], clipboardData.files[0].name);
  window.onhashchange = openAddress;
}

setUp();
selectModel(model);
if (!openAddress()) openExample(`${MODELS[0].examples}${MODELS[0].images[0]}.png`);
