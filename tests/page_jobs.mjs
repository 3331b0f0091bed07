// What the page's code makes of jobs, for tests/test_page.py: in node by page_checks.mjs, in a browser as it is.

import { blended, onWhite, toSquare, toTiles } from "../page/canvas.js";
import { EntropyModels } from "../page/entropy.js";
import { FormatError, hex } from "../page/format.js";
import { Tokenizer } from "../page/tokenizer.js";

const kept = new Map();

function once(key, make) {
  if (!kept.has(key)) kept.set(key, make());
  return kept.get(key);
}

const fetched = async (path) => (await fetch(new URL(`../${path}`, import.meta.url))).arrayBuffer();
const bytesOf = (text) => Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));

/** The results of jobs, {job, ...}; load gives the bytes of a path of the repository. */
export async function run(jobs, load = fetched) {
  const storeOf = (path) => once(path, async () => new EntropyModels(await load(path)));
  const tokenizerOf = (folder, withSimd = true) =>
    once(`${folder} ${withSimd}`, async () => {
      const config = JSON.parse(new TextDecoder().decode(await load(`${folder}/config.json`)));
      return new Tokenizer(config, await load(`${folder}/model.safetensors`), { withSimd });
    });
  const results = [];
  for (const { job, store, model, withSimd, ...given } of jobs) {
    if (store) given.models = await storeOf(store);
    if (model) given.tokenizer = await tokenizerOf(model, withSimd);
    results.push(JOBS[job](given));
  }
  return results;
}

const JOBS = {
  read({ models, file, sizes }) {
    const data = bytesOf(file);
    return (sizes ?? [data.length]).map((size) => {
      try {
        const { geometry, mode, tiles, headerSize } = models.read(data.subarray(0, size));
        return { geometry, mode, tiles, headerSize };
      } catch (error) {
        if (!(error instanceof FormatError)) throw error;
        return { error: error.message };
      }
    });
  },
  write: ({ models, tiles, geometry, mode }) => hex(models.write(tiles, geometry ?? null, mode ?? undefined)),
  prefixes({ models, tokens, mode }) {
    const shares = models.shares([tokens]);
    return tokens.map((_, place) => hex(models.payload(mode, [tokens.slice(0, place + 1)], shares)));
  },
  logits: ({ models, before }) => Array.from(models.network.logits(before)),
  starts: ({ models, before }) => Array.from(models.starts(2, before)),
  square: ({ width, height, rgba, fit, side }) => {
    const { square, ...rest } = toSquare(onWhite({ width, height, data: bytesOf(rgba) }), fit, side);
    return { square: hex(square), ...rest };
  },
  tiles({ width, height, rgba, side }) {
    const { squares, geometry } = toTiles(onWhite({ width, height, data: bytesOf(rgba) }), side);
    return { squares: squares.map(hex), geometry };
  },
  blend: ({ squares, geometry, side }) =>
    hex(
      blended(
        squares.map((square) => square && bytesOf(square)),
        geometry,
        side,
      ).pixels,
    ),
  encode: ({ tokenizer, pixels }) => tokenizer.encode(bytesOf(pixels)),
  decode: ({ tokenizer, tokens }) => hex(tokenizer.decode(tokens)),
};
