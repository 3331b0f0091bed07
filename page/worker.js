// What takes time, beside the page: models, and what they make of images and files. Answers {id, result} or {id, error}.

import { covers, onWhite, toSquare, toTiles, withinSide } from "./canvas.js";
import { EntropyModels } from "./entropy.js";
import { FITS, FormatError, MODES, hex, readHeader } from "./format.js";
import { MODELS } from "./models.js";
import { Tokenizer } from "./tokenizer.js";

const MOST_TILES = 500; // that are decoded: half a minute's work
const TILED_SIDE = 256; // of an image that is cut into tiles: 81 of them at most

const stores = new Map(),
  tokenizers = new Map();

/** A function that is called once for each name, whatever comes of it kept; what failed is tried again. */
function kept(results, make) {
  return (name) => {
    if (!results.has(name))
      results.set(
        name,
        make(name).catch((error) => (results.delete(name), Promise.reject(error))),
      );
    return results.get(name);
  };
}

const storeOf = kept(stores, async (name) => new EntropyModels(await fetched(`models/${name}/entropy.safetensors`)));
const latest = new Map(); // the last call that asked for each tokenizer: it hears how far fetching is
const keptTokenizerOf = kept(tokenizers, async (name) => {
  const files = [fetched(`models/${name}/config.json`), fetched(`models/${name}/model.safetensors`, name)];
  const [config, weights] = await Promise.all(files);
  return new Tokenizer(JSON.parse(new TextDecoder().decode(config)), weights);
});

const tokenizerOf = (name, id) => (latest.set(name, id), keptTokenizerOf(name));

/** The bytes of a file, reported on the way where they are the weights of a model. */
async function fetched(path, model = null) {
  const response = await fetch(path).catch(() => null);
  if (!response?.ok)
    throw new Error(
      `${path} could not be fetched${response ? ` (${response.status})` : ""}. Is the page whole, and are you online?`,
    );
  const isPacked = response.headers.has("Content-Encoding"); // then its length is another
  const total = isPacked ? 0 : Number(response.headers.get("Content-Length")),
    parts = [];
  let size = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    if (model) tell(latest.get(model), size, total, "Fetching the model");
  }
  return new Blob(parts).arrayBuffer();
}

const ACTIONS = {
  /**
   * Of an image as a canvas has it what the model sees of it, its tokens, and files of each number of them.
   *
   * size: width and height of the image, where the canvas has it scaled down.
   */
  async encode({ model, image, size, fit }, id) {
    const [tokenizer, store] = await Promise.all([tokenizerOf(model, id), storeOf(model)]);
    const given = onWhite(image),
      { side } = tokenizer;
    if (FITS[fit] === "tile") {
      const seen = withinSide(given, TILED_SIDE),
        { squares, geometry } = toTiles(seen, side);
      const tiles = squares.map((square, tile) => {
        tell(id, tile, squares.length, "Encoding");
        return tokenizer.encode(square);
      });
      return {
        seen: { ...seen, box: [0, 0, seen.width, seen.height] },
        geometry,
        tiles,
        ...filesOf(store, tiles, geometry),
      };
    }
    const { square, box, geometry } = toSquare(given, fit, side),
      tiles = [tokenizer.encode(square)];
    const said = geometry && { ...geometry, ...size };
    return {
      seen: { width: side, height: side, pixels: square, box },
      geometry: said,
      tiles,
      ...filesOf(store, tiles, said),
    };
  },

  /** Bytes of the square that the first tokens of an image, or of a tile, show. */
  async decode({ model, tokens }, id) {
    return (await tokenizerOf(model, id)).decode(tokens);
  },

  /** What a .1dp file holds, by the model that wrote it. */
  async open({ bytes }, id) {
    const { tokenizer: written, lengths } = readHeader(bytes);
    for (const { name } of MODELS) {
      const store = await storeOf(name);
      if (hex(store.tokenizer.subarray(0, 2)) !== hex(written)) continue;
      if (lengths.length > MOST_TILES) {
        throw new FormatError(
          `The file has ${lengths.length} tiles, and this page shows ${MOST_TILES} at most: use scripts/decompress.py.`,
        );
      }
      const { side } = await tokenizerOf(name, id),
        { geometry, tiles, isCut } = store.read(bytes);
      if (!tiles.some((tokens) => tokens.length))
        throw new FormatError("The file is cut before its first token: nothing is left of the image.");
      if (geometry?.tiles && !covers(geometry, side))
        throw new FormatError("The file is damaged: its tiles do not cover the image.");
      return { model: name, side, geometry, tiles, isCut, ...filesOf(store, tiles, geometry) };
    }
    const known = MODELS.map(({ label }) => label.toLowerCase()).join(" and ");
    throw new FormatError(
      `The file was written with a tokenizer that this page does not have (${hex(written)}): it has those of ${known}.`,
    );
  },
};

/**
 * Files of the first 1, 2, ... tokens, of each tile where there are several, and the bits that a token costs at each place.
 *
 * A file is null where a tile has no tokens, as in what is left of a cut one: no file says that.
 */
function filesOf(store, tiles, geometry) {
  const most = tiles.reduce((longest, tokens) => Math.max(longest, tokens.length), 0),
    shares = store.shares(tiles);
  const files = Array.from({ length: most }, (_, place) => {
    const kept = tiles.map((tokens) => tokens.slice(0, place + 1)),
      lengths = kept.map((tokens) => tokens.length);
    if (!lengths.every(Boolean)) return null;
    const bytes = store.write(
      kept,
      geometry?.tiles ? { ...geometry, tiles: { ...geometry.tiles, lengths } } : geometry,
      undefined,
      shares,
    );
    const { mode, parts } = readHeader(bytes);
    return { bytes, mode: MODES[mode], parts };
  });
  const bits = files.map((_, place) => {
    const found = shares
      .at(-1)
      .filter((tile) => tile.length > place)
      .map((tile) => store.totalBits - Math.log2(tile[place][1]));
    return found.reduce((a, b) => a + b) / found.length;
  });
  return { files, bits };
}

/** Report how far the long work of a call is. */
const tell = (id, size, total, doing) => postMessage({ id, progress: { size, total, doing } });

onmessage = async ({ data: { id, action, ...given } }) => {
  try {
    postMessage({ id, result: await ACTIONS[action](given, id) });
  } catch (error) {
    console.error(error);
    postMessage({ id, error: error.message });
  }
};
