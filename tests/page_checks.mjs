// Runs the page's code for tests/test_page.py: jobs as JSON in, their results as JSON out.

import { readFileSync } from "node:fs";

import { blended, onWhite, toSquare, toTiles } from "../page/canvas.js";
import { EntropyModels } from "../page/entropy.js";
import { FormatError, hex } from "../page/format.js";
import { Tokenizer } from "../page/tokenizer.js";

const kept = new Map();

function once(key, make) {
  if (!kept.has(key)) kept.set(key, make());
  return kept.get(key);
}

function bufferOf(path) {
  const file = readFileSync(path);
  return file.buffer.slice(file.byteOffset, file.byteOffset + file.length);
}

const storeOf = (path) => once(path, () => new EntropyModels(bufferOf(path)));
const tokenizerOf = (folder, withSimd) =>
  once(`${folder} ${withSimd}`, () => {
    const config = JSON.parse(readFileSync(`${folder}/config.json`));
    return new Tokenizer(config, bufferOf(`${folder}/model.safetensors`), { withSimd });
  });
const bytesOf = (text) => Uint8Array.from(Buffer.from(text, "hex"));

const JOBS = {
  read({ store, file, sizes }) {
    const data = bytesOf(file);
    return (sizes ?? [data.length]).map((size) => {
      try {
        const { geometry, mode, tiles, headerSize } = storeOf(store).read(data.subarray(0, size));
        return { geometry, mode, tiles, headerSize };
      } catch (error) {
        if (!(error instanceof FormatError)) throw error;
        return { error: error.message };
      }
    });
  },
  write: ({ store, tiles, geometry, mode }) => hex(storeOf(store).write(tiles, geometry ?? null, mode)),
  prefixes({ store, tokens, mode }) {
    const shares = storeOf(store).shares([tokens]);
    return tokens.map((_, place) => hex(storeOf(store).payload(mode, [tokens.slice(0, place + 1)], shares)));
  },
  logits: ({ store, before }) => Array.from(storeOf(store).network.logits(before)),
  starts: ({ store, before }) => Array.from(storeOf(store).starts(2, before)),
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
  encode: ({ model, pixels, withSimd }) => tokenizerOf(model, withSimd ?? true).encode(bytesOf(pixels)),
  decode: ({ model, tokens, withSimd }) => hex(tokenizerOf(model, withSimd ?? true).decode(tokens)),
};

const jobs = JSON.parse(readFileSync(0));
process.stdout.write(JSON.stringify(jobs.map(({ job, ...given }) => JOBS[job](given))));
