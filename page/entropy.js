// The entropy models of a tokenizer, and files of tokens by them. Written from docs/format.md, sections 2 to 7.

import {
  FormatError,
  MODES,
  RangeReader,
  RangeWriter,
  bitsOf,
  hex,
  isFilledWithZeros,
  mayHold,
  packBits,
  readHeader,
  unpackBits,
  writeFile,
} from "./format.js";
import { readSafetensors } from "./safetensors.js";
import { sha256 } from "./sha256.js";

const FIXED = 0,
  TABLES = 1,
  NETWORK = 2;
const TYPES = { I8: "|i1", I32: "<i4", U16: "<u2" };
const E = Float64Array.from({ length: 256 }, (_, index) => Math.floor(2 ** (20 - index / 256)));

export class EntropyModels {
  /** buffer: the ArrayBuffer of an entropy.safetensors. */
  constructor(buffer) {
    const { metadata, arrays } = readSafetensors(buffer),
      about = JSON.parse(metadata.entropy);
    if (about.version !== 1)
      throw new Error(`The entropy models are of version ${about.version}, and this page reads version 1.`);
    this.arrays = arrays;
    this.tokenizer = Uint8Array.from(about.tokenizer.match(/../g), (byte) => parseInt(byte, 16));
    this.totalBits = about.total_bits;
    this.numTokens = arrays.table_of_position.shape[0];
    [, this.codebookSize] = arrays.tables.shape;
    this.modes = "codes" in arrays ? [FIXED, TABLES, NETWORK] : [FIXED, TABLES];
    this.bytes = this.modes.map((mode) => (mode === FIXED ? 0 : this.#identity(mode)[0]));
    this.network = "codes" in arrays && new Network(arrays);
    this.tables = new Map();
  }

  /** Section 6. */
  #identity(mode) {
    const names = mode === NETWORK ? Object.keys(this.arrays).sort() : ["table_of_position", "tables"];
    const parts = [`${MODES[mode]} ${this.totalBits}`];
    for (const name of names) {
      const { dtype, shape, bytes } = this.arrays[name];
      parts.push(`\n${name} ${TYPES[dtype]} (${shape.length === 1 ? `${shape},` : shape.join(", ")})\n`, bytes);
    }
    return sha256(parts);
  }

  /** Where each code's share of the next token starts, and the sum of all; of tables kept. */
  starts(mode, before) {
    if (mode === NETWORK) return startsOf(this.network.logits(before), this.totalBits);
    const { tables, table_of_position: places } = this.arrays,
      table = places.values[before.length];
    if (!this.tables.has(table)) {
      const logits = Int32Array.from(
        tables.values.subarray(table * this.codebookSize, (table + 1) * this.codebookSize),
        (value) => 16 * value,
      );
      this.tables.set(table, startsOf(logits, this.totalBits));
    }
    return this.tables.get(table);
  }

  get width() {
    return bitsOf(this.codebookSize - 1);
  }

  /** What tokens cost by each mode but fixed bits: of each of an image's tiles [start, share] of each token. */
  shares(tiles) {
    const sharesOf = (mode, tokens) =>
      tokens.map((token, place) => {
        const starts = this.starts(mode, tokens.slice(0, place));
        return [starts[token], starts[token + 1] - starts[token]];
      });
    return this.modes.map((mode) => mode !== FIXED && tiles.map((tokens) => sharesOf(mode, tokens)));
  }

  /** The payload of an image's tiles, each a list of tokens; shares: as `shares` gives them, or of more tokens. */
  payload(mode, tiles, shares = this.shares(tiles)) {
    const order = inOrder(tiles.map((tokens) => tokens.length)),
      writer = new RangeWriter();
    if (mode === FIXED)
      return packBits(
        Array.from(order, ([tile, place]) => tiles[tile][place]),
        this.width,
      );
    for (const [tile, place] of order) writer.write(...shares[mode][tile][place], this.totalBits);
    return writer.finished();
  }

  /** A file of an image's tiles, [tokens] of one without; the smallest, where no mode is given. Shares as of `payload`. */
  write(tiles, geometry = null, mode = undefined, shares = this.shares(tiles)) {
    const lengths = tiles.map((tokens) => tokens.length),
      count = lengths.reduce((a, b) => a + b, 0);
    const payloads = (mode === undefined ? this.modes : [mode])
      .map((tried) => [tried, this.payload(tried, tiles, shares)])
      .filter(([tried, payload]) => mayHold(tried, payload.length, count));
    const [best, payload] = payloads.reduce((a, b) => (b[1].length < a[1].length ? b : a));
    const header = {
      mode: best,
      tokenizer: this.tokenizer.subarray(0, 2),
      entropy: this.bytes[best],
      lengths,
      geometry,
    };
    return writeFile(header, payload);
  }

  /**
   * What a file holds: its header, and of each tile the tokens that are certain, which are all of a whole file.
   *
   * Throws FormatError for what section 7 rejects.
   */
  read(data) {
    const header = readHeader(data),
      { mode, numTokens, lengths, payload, isCut } = header;
    if (hex(header.tokenizer) !== hex(this.tokenizer.subarray(0, 2))) {
      throw new FormatError(
        `The file is of another tokenizer, ${hex(header.tokenizer)}; this one is ${hex(this.tokenizer.subarray(0, 2))}.`,
      );
    }
    if (header.entropy !== this.bytes[mode]) {
      throw new FormatError(
        "The header is damaged, or the file was written with other entropy models of this tokenizer.",
      );
    }
    if (numTokens > this.numTokens)
      throw new FormatError(`The file is damaged: ${numTokens} tokens, and an image has ${this.numTokens}.`);
    const tiles =
      mode === FIXED ? this.#readFixed(payload, lengths, isCut) : this.#readCoded(mode, payload, lengths, isCut);
    if (isCut && tiles.every((tokens, tile) => tokens.length === lengths[tile])) {
      throw new FormatError("The file is damaged: it is shorter than it says, and no token is missing.");
    }
    return { ...header, tiles };
  }

  #readFixed(payload, lengths, isCut) {
    const declared = lengths.reduce((a, b) => a + b, 0),
      count = Math.min(declared, Math.floor((8 * payload.length) / this.width));
    const values = unpackBits(payload, this.width, count),
      tiles = lengths.map(() => []);
    if (values.some((value) => value >= this.codebookSize))
      throw new FormatError("The payload is damaged: there is no such token.");
    const isExact = count === declared && payload.length === Math.ceil((count * this.width) / 8);
    if (!isCut && !(isExact && isFilledWithZeros(payload, count * this.width))) throw damaged();
    const order = inOrder(lengths);
    for (const value of values) tiles[order.next().value[0]].push(value);
    return tiles;
  }

  #readCoded(mode, payload, lengths, isCut) {
    const tiles = lengths.map(() => []),
      reader = new RangeReader(payload),
      writer = new RangeWriter();
    let left = isCut ? 64 * (payload.length + 16) : Infinity; // section 7
    for (const [tile] of inOrder(lengths)) {
      if (left-- === 0) break;
      const starts = this.starts(mode, tiles[tile]),
        token = reader.read(starts, this.totalBits);
      if (isCut && !reader.isCertain) return tiles;
      if (!isCut) writer.write(starts[token], starts[token + 1] - starts[token], this.totalBits);
      tiles[tile].push(token);
    }
    if (!isCut && hex(writer.finished()) !== hex(payload)) throw damaged();
    return tiles;
  }
}

const damaged = () => new FormatError("The payload is damaged: its tokens are not written so.");

/** Section 2: [tile, place] of every token, one after another: a damaged file may declare millions. */
function* inOrder(lengths) {
  const most = lengths.reduce((a, b) => Math.max(a, b), 0);
  for (let place = 0; place < most; place++)
    for (let tile = 0; tile < lengths.length; tile++) if (place < lengths[tile]) yield [tile, place];
}

/** Section 5: from logits to the starts of the shares, and 2^T behind them. */
export function startsOf(logits, totalBits) {
  const size = logits.length,
    weights = new Int32Array(size);
  let most = -Infinity,
    first = 0,
    total = 0;
  for (let code = 0; code < size; code++) if (logits[code] > most) [most, first] = [logits[code], code];
  for (let code = 0; code < size; code++) {
    const below = most - logits[code];
    total += weights[code] = E[below & 255] >> Math.min(below >> 8, 31);
  }
  const spread = 2 ** totalBits - size,
    starts = new Float64Array(size + 1);
  for (let code = 0; code < size; code++)
    starts[code + 1] = starts[code] + 1 + Math.floor((weights[code] * spread) / total);
  const left = 2 ** totalBits - starts[size];
  for (let code = first + 1; code <= size; code++) starts[code] += left;
  return starts;
}

/** Section 5, mode 2: sums of products of 8 bits, under 2^24, in 32. */
class Network {
  constructor(arrays) {
    Object.assign(this, Object.fromEntries(Object.entries(arrays).map(([name, { values }]) => [name, values])));
    [this.codebookSize, this.depth] = arrays.codes.shape;
    [this.width] = arrays.head.shape;
    [this.blocks] = arrays.hidden.shape;
    [this.numTokens] = arrays.table_of_position.shape;
    this.shapes = Object.fromEntries(["pairs", "near", "far"].map((name) => [name, arrays[name].shape[0]]));
  }

  /** Of every code, after the tokens before. */
  logits(before) {
    const { width, codebookSize } = this,
      place = before.length;
    const sums = this.position_bias.slice(place * width, (place + 1) * width);
    before.forEach((token, earlier) => this.#addToken(sums, token, place, earlier));
    const hidden = clamped(sums, this.position_scale[place]);
    for (let block = 0; block < this.blocks; block++) {
      const first = (block * this.numTokens + place) * width,
        more = this.hidden_bias.slice(first, first + width);
      addProduct(more, hidden, this.hidden, block * width * width);
      clamped(more, this.hidden_scale[block]).forEach((value, unit) => (hidden[unit] += value));
    }
    const ends = new Int32Array(codebookSize),
      table = this.table_of_position[place] * codebookSize;
    addProduct(ends, hidden, this.head, 0);
    for (let code = 0; code < codebookSize; code++)
      ends[code] = rounded(ends[code], this.head_scale[0]) + 16 * this.tables[table + code];
    return ends;
  }

  /** Add codes[token] A(place, earlier). */
  #addToken(sums, token, place, earlier) {
    const { pairs, near, far } = this.shapes,
      size = this.depth * this.width;
    const codes = this.codes.subarray(token * this.depth, (token + 1) * this.depth);
    if (pairs) addProduct(sums, codes, this.pairs, ((place * (place - 1)) / 2 + earlier) * size);
    else if (place - earlier <= near) addProduct(sums, codes, this.near, (near - (place - earlier)) * size);
    else if (earlier < far) addProduct(sums, codes, this.far, earlier * size);
  }
}

/** sums += values times the matrix that begins at `first`. */
function addProduct(sums, values, matrix, first) {
  const width = sums.length;
  for (let row = 0; row < values.length; row++, first += width) {
    const value = values[row];
    if (value === 0) continue;
    for (let column = 0; column < width; column++) sums[column] += value * matrix[first + column];
  }
}

const rounded = (value, scale) => Math.floor((value * scale + 2 ** 23) / 2 ** 24);
const clamped = (values, scale) => values.map((value) => Math.min(255, Math.max(0, rounded(value, scale))));
