// What takes time, beside the page: models, and what they make of images and files. Answers {id, result} or {id, error}.

import { blended, covers, onWhite, toSquare } from "./canvas.js";
import { EntropyModels } from "./entropy.js";
import { FormatError, MODES, hex, mayHold, readHeader } from "./format.js";
import { MODELS } from "./models.js";
import { Tokenizer } from "./tokenizer.js";

const MOST_TILES = 500; // that are decoded: half a minute's work

const stores = new Map(), tokenizers = new Map();

/** A function that is called once for each name, whatever comes of it kept; what failed is tried again. */
function kept(results, make) {
  return (name) => {
    if (!results.has(name)) results.set(name, make(name).catch((error) => (results.delete(name), Promise.reject(error))));
    return results.get(name);
  };
}

const storeOf = kept(stores, async (name) => new EntropyModels(await fetched(`models/${name}/entropy.safetensors`)));
const tokenizerOf = kept(tokenizers, async (name) => {
  const config = JSON.parse(new TextDecoder().decode(await fetched(`models/${name}/config.json`)));
  return new Tokenizer(config, await fetched(`models/${name}/model.safetensors`, true));
});

async function fetched(path, isReported = false) {
  const response = await fetch(path).catch(() => null);
  if (!response?.ok) throw new Error(`${path} could not be fetched${response ? ` (${response.status})` : ""}. Is the page whole, and are you online?`);
  const total = Number(response.headers.get("Content-Length")), parts = [];
  let size = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    if (isReported) postMessage({ progress: { size, total } });
  }
  return new Blob(parts).arrayBuffer();
}

const ACTIONS = {
  /** Fetch a model. */
  async load({ model }) {
    const [tokenizer, store] = await Promise.all([tokenizerOf(model), storeOf(model)]);
    return { side: tokenizer.side, numTokens: tokenizer.numTokens, tokenizer: hex(store.tokenizer) };
  },

  /**
   * Of an image as a canvas has it the square that the model sees, its tokens, and files of each number of them.
   *
   * size: width and height of the image, where the canvas has it scaled down.
   */
  async encode({ model, image, size, fit }) {
    const [tokenizer, store] = await Promise.all([tokenizerOf(model), storeOf(model)]);
    const { square, box, geometry } = toSquare(onWhite(image), fit, tokenizer.side);
    const tokens = tokenizer.encode(square), said = geometry && { ...geometry, ...size };
    return { square, box, geometry: said, tiles: [tokens], ...prefixes(store, tokens, said) };
  },

  /** What the first tokens of an image show; of tiles that many of each, and their file. */
  async decode({ model, tiles, length, geometry }) {
    const tokenizer = await tokenizerOf(model), { side } = tokenizer;
    if (!geometry?.tiles) return { width: side, height: side, pixels: tokenizer.decode(tiles[0].slice(0, length)) };
    const kept = tiles.map((tokens) => tokens.slice(0, length));
    const squares = kept.map((tokens, tile) => {
      postMessage({ progress: { size: tile, total: tiles.length } });
      return tokens.length ? tokenizer.decode(tokens) : null;
    });
    return { ...blended(squares, geometry, side), file: tiledFile(await storeOf(model), kept, geometry) };
  },

  /** What a .1dp file holds, by the model that wrote it. */
  async open({ bytes }) {
    const { tokenizer: written, lengths } = readHeader(bytes);
    for (const { name } of MODELS) {
      const store = await storeOf(name);
      if (hex(store.tokenizer.subarray(0, 2)) !== hex(written)) continue;
      if (lengths.length > MOST_TILES) {
        throw new FormatError(`The file has ${lengths.length} tiles, and this page shows ${MOST_TILES} at most: use scripts/decompress.py.`);
      }
      const { side } = await tokenizerOf(name), { geometry, tiles, isCut } = store.read(bytes);
      if (!tiles.some((tokens) => tokens.length)) throw new FormatError("The file is cut before its first token: nothing is left of the image.");
      if (geometry?.tiles && !covers(geometry, side)) throw new FormatError("The file is damaged: its tiles do not cover the image.");
      const files = geometry?.tiles ? { files: [], bits: null } : prefixes(store, tiles[0], geometry);
      return { model: name, geometry, tiles, isCut, ...files };
    }
    const known = MODELS.map(({ label }) => label.toLowerCase()).join(" and ");
    throw new FormatError(`The file was written with a tokenizer that this page does not have (${hex(written)}): it has those of ${known}.`);
  },
};

/** Files of the first 1, 2, ... tokens, each the smallest, and what each token costs in bits. */
function prefixes(store, tokens, geometry) {
  const payloads = store.modes.map((mode) => store.prefixes(mode, tokens));
  const files = tokens.map((_, place) => {
    const modes = store.modes.filter((mode) => mayHold(mode, payloads[mode][place].length, place + 1));
    const best = modes.reduce((a, b) => (payloads[b][place].length < payloads[a][place].length ? b : a));
    return described(store.file(best, payloads[best][place], [place + 1], geometry));
  });
  const shares = store.modes.length > 1 && store.shares(store.modes.at(-1), tokens);
  return { files, bits: shares && shares.map(([, share]) => store.totalBits - Math.log2(share)) };
}

/** null where tiles lack all of their tokens, as in what is left of a cut file: no file says that. */
function tiledFile(store, tiles, geometry) {
  const lengths = tiles.map((tokens) => tokens.length);
  if (!lengths.every(Boolean)) return null;
  return described(store.write(tiles, { ...geometry, tiles: { ...geometry.tiles, lengths } }));
}

function described(bytes) {
  const { mode, parts } = readHeader(bytes);
  return { bytes, mode: MODES[mode], parts };
}

onmessage = async ({ data: { id, action, ...given } }) => {
  try {
    postMessage({ id, result: await ACTIONS[action](given) });
  } catch (error) {
    console.error(error);
    postMessage({ id, error: error.message });
  }
};
