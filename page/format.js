// The bytes of a .1dp file: header, packed bits and range coder. Written from docs/format.md; its sections are named.
//
// Numbers of up to 53 bits are exact in JavaScript, and no more are needed. Bit operators take 32: they are used below.

export const MODES = ["fixed", "tables", "network"],
  FITS = ["crop", "pad", "stretch", "tile"];
const MAGIC = 0x1d,
  VERSION = 1,
  TILE = FITS.indexOf("tile");
const MAX_TOKENS = 4096,
  MAX_SIDE = 65535,
  MAX_PIXELS = 2 ** 26,
  MAX_TILES = 65536;
const TOP = 2 ** 48,
  BOTTOM = 2 ** 40;

/** Bytes that are no .1dp file, a damaged one, or one that this reader cannot read. */
export class FormatError extends Error {}

export const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

// ------------------------------------------------------------------------------------------- section 1: checks

function table(step) {
  return Uint32Array.from({ length: 256 }, (_, value) => {
    for (let bit = 0; bit < 8; bit++) value = step(value);
    return value;
  });
}

const CRC8 = table((value) => ((value << 1) ^ (value & 0x80 ? 0x1d : 0)) & 0xff);
const CRC32 = table((value) => (value >>> 1) ^ (value & 1 ? 0xedb88320 : 0)); // its bits run the other way

export const crc8 = (bytes) => bytes.reduce((check, byte) => CRC8[check ^ byte], 0xff) ^ 0xff;
export const crc32 = (bytes) => ~bytes.reduce((check, byte) => (check >>> 8) ^ CRC32[(check ^ byte) & 0xff], -1) >>> 0;

function checkOf(bytes, size) {
  if (size === 1) return [crc8(bytes)];
  const check = crc32(bytes);
  return [check >>> 24, (check >>> 16) & 255, (check >>> 8) & 255, check & 255];
}

// ------------------------------------------------------------------------------------------- section 1: layout

/**
 * What stands before a payload, the payload as far as it is there, and the `parts` of the file, [name, bytes].
 *
 * Throws FormatError.
 */
export function readHeader(data) {
  const reader = new Reader(data);
  const [magic, kind] = reader.take(2);
  if (magic !== MAGIC || kind >> 4 !== 5) throw new FormatError("This is no .1dp file: it does not begin with 1d 5x.");
  const version = ((kind >> 2) & 3) + 1,
    mode = kind & 3;
  if (version !== VERSION)
    throw new FormatError(`The file is of version ${version}, and this page reads version ${VERSION}.`);
  if (mode >= MODES.length) throw new FormatError(`The file is damaged: there is no mode ${mode}.`);
  reader.mark("version, mode");
  const tokenizer = reader.take(2);
  reader.mark("tokenizer");
  const [mixed] = reader.take(1);
  reader.mark("entropy model");
  const tokens = reader.varint();
  reader.mark("tokens");
  const size = reader.varint();
  reader.mark("size");
  const numTokens = (tokens >> 1) + 1;
  checkRange("tokens", numTokens, MAX_TOKENS);
  const geometry = tokens & 1 ? readGeometry(reader, numTokens) : null;
  reader.mark("geometry");
  const fields = data.subarray(0, reader.place);
  const entropy = mixed ^ crc8([...fields.subarray(0, 4), ...fields.subarray(5)]);
  const header = {
    mode,
    tokenizer,
    entropy,
    numTokens,
    size,
    geometry,
    lengths: geometry?.tiles?.lengths ?? [numTokens],
  };
  checkHolds(header);
  const check = reader.take(geometry?.tiles ? 4 : 1),
    payload = data.subarray(reader.place);
  reader.mark("check");
  if (payload.length > size)
    throw new FormatError(`The file is damaged: it has ${payload.length - size} bytes too many.`);
  const isCut = payload.length < size;
  if (!isCut && hex(checkOf([...fields, ...payload], check.length)) !== hex(check)) {
    throw new FormatError("The file is damaged: its check does not fit its bytes. Get it again.");
  }
  return { ...header, payload, isCut, headerSize: reader.place, parts: [...reader.parts, ["payload", payload.length]] };
}

/** A whole file; header: mode, tokenizer (2 bytes), entropy, lengths and geometry. */
export function writeFile({ mode, tokenizer, entropy, lengths, geometry }, payload) {
  const numTokens = lengths.reduce((most, length) => Math.max(most, length), 0);
  checkHolds({ mode, lengths, size: payload.length });
  const head = [MAGIC, 0x50 | ((VERSION - 1) << 2) | mode, ...tokenizer];
  const about = geometry ? geometryBytes(geometry, numTokens) : [];
  const tail = [...varint(2 * (numTokens - 1) + (geometry ? 1 : 0)), ...varint(payload.length), ...about];
  const fields = [...head, entropy ^ crc8([...head, ...tail]), ...tail];
  return Uint8Array.from([...fields, ...checkOf([...fields, ...payload], geometry?.tiles ? 4 : 1), ...payload]);
}

function readGeometry(reader, numTokens) {
  const [kind] = reader.take(1),
    fit = kind >> 3,
    orientation = (kind & 7) + 1;
  if (fit >= FITS.length) throw new FormatError(`The file is damaged, or of a later version: there is no fit ${fit}.`);
  const width = reader.varint() + 1,
    height = reader.varint() + 1;
  checkRange("pixels in width", width, MAX_SIDE);
  checkRange("pixels in height", height, MAX_SIDE);
  checkRange("pixels", width * height, MAX_PIXELS);
  return { fit, orientation, width, height, tiles: fit === TILE ? readTiles(reader, numTokens) : null };
}

function readTiles(reader, most) {
  const columns = reader.varint() + 1,
    rows = reader.varint() + 1,
    least = reader.varint() + 1;
  checkRange("tiles", columns * rows, MAX_TILES);
  checkRange("tokens of the shortest tile", least, most);
  const width = bitsOf(most - least),
    packed = reader.take(Math.ceil((columns * rows * width) / 8));
  const lengths = unpackBits(packed, width, columns * rows).map((more) => least + more);
  const holds = (length) => lengths.includes(length);
  if (
    !isFilledWithZeros(packed, width * lengths.length) ||
    !holds(least) ||
    !holds(most) ||
    lengths.some((length) => length > most)
  ) {
    throw new FormatError(`The file is damaged: its tiles must have ${least} to ${most} tokens.`);
  }
  return { columns, rows, lengths };
}

function geometryBytes({ fit, orientation, width, height, tiles }, most) {
  const bytes = [(fit << 3) | (orientation - 1), ...varint(width - 1), ...varint(height - 1)];
  if (!tiles) return bytes;
  const least = tiles.lengths.reduce((a, b) => Math.min(a, b));
  bytes.push(...varint(tiles.columns - 1), ...varint(tiles.rows - 1), ...varint(least - 1));
  return bytes.concat(
    packBits(
      tiles.lengths.map((length) => length - least),
      bitsOf(most - least),
    ),
  );
}

/** Section 7: whether a payload of this size may hold that many tokens. */
export const mayHold = (mode, size, count) => size <= 4 * count && (mode === 0 || count <= 64 * (size + 16));

function checkHolds({ mode, size, lengths }) {
  const count = lengths.reduce((a, b) => a + b, 0);
  if (!mayHold(mode, size, count))
    throw new FormatError(`The file is damaged: ${size} bytes cannot hold ${count} tokens.`);
}

function checkRange(what, value, most) {
  if (value < 1 || value > most)
    throw new FormatError(`The file is damaged: 1 to ${most} ${what} are possible, and it says ${value}.`);
}

class Reader {
  constructor(data) {
    this.data = data;
    this.place = this.marked = 0;
    this.parts = [];
  }

  /** Name what was read since the last mark. */
  mark(name) {
    if (this.place > this.marked) this.parts.push([name, this.place - this.marked]);
    this.marked = this.place;
  }

  take(count) {
    if (this.place + count > this.data.length) {
      throw new FormatError(`The file ends within its header, after ${this.data.length} bytes. Get it again.`);
    }
    this.place += count;
    return this.data.subarray(this.place - count, this.place);
  }

  varint() {
    for (let value = 0, bytes = 0; bytes < 4; bytes++) {
      const [byte] = this.take(1);
      value += (byte & 127) * 128 ** bytes;
      if (byte >= 128) continue;
      if (bytes && !byte) break; // there is a shorter form
      return value;
    }
    throw new FormatError("The file is damaged: a number in its header has a wrong form.");
  }
}

const varint = (value) => (value < 128 ? [value] : [(value & 127) | 128, ...varint(value >>> 7)]);

// ------------------------------------------------------------------------------------------- section 3: fixed bits

/** How many bits a number has; 0 of 0. */
export const bitsOf = (value) => 32 - Math.clz32(value);

export function packBits(values, width) {
  const bytes = new Uint8Array(Math.ceil((values.length * width) / 8));
  values.forEach((value, index) => {
    for (let bit = 0; bit < width; bit++) {
      const place = index * width + bit;
      if ((value >> (width - 1 - bit)) & 1) bytes[place >> 3] |= 0x80 >> (place & 7);
    }
  });
  return Array.from(bytes);
}

export function unpackBits(bytes, width, count) {
  return Array.from({ length: count }, (_, index) => {
    let value = 0;
    for (let place = index * width; place < (index + 1) * width; place++)
      value = 2 * value + ((bytes[place >> 3] >> (7 - (place & 7))) & 1);
    return value;
  });
}

/** Whether all bits from `first` to the end of the last byte are 0. */
export const isFilledWithZeros = (bytes, first) => first % 8 === 0 || (bytes[first >> 3] & (0xff >> (first & 7))) === 0;

// ------------------------------------------------------------------------------------------- section 4: range coder

export class RangeWriter {
  constructor() {
    this.bytes = [];
    this.low = 0;
    this.range = TOP;
  }

  /** Write what has `share` of all 2^totalBits shares, `start` being before it. */
  write(start, share, totalBits) {
    const step = Math.floor(this.range / 2 ** totalBits);
    this.low += step * start;
    this.range = step * share;
    if (this.low >= TOP) {
      this.low -= TOP;
      carry(this.bytes);
    }
    while (this.range < BOTTOM) {
      this.bytes.push(Math.floor(this.low / BOTTOM));
      this.low = (this.low % BOTTOM) * 256;
      this.range *= 256;
    }
  }

  /** The shortest bytes that are read back with zeros behind them. More may be written afterwards. */
  finished() {
    const bytes = this.bytes.slice();
    if (this.low + this.range > TOP) carry(bytes);
    else if (this.low > 0) bytes.push(Math.ceil(this.low / BOTTOM));
    while (bytes.at(-1) === 0) bytes.pop();
    return bytes;
  }
}

function carry(bytes) {
  let place = bytes.length - 1;
  while (bytes[place] === 255) bytes[place--] = 0;
  bytes[place]++;
}

/** Reads a payload as if zeros followed; `isCertain` as long as any other bytes there would not matter. */
export class RangeReader {
  constructor(payload) {
    this.payload = payload;
    this.place = 0;
    this.code = 0;
    this.slack = 0; // what ones behind the payload would add to `code`
    this.range = TOP;
    this.isCertain = true;
    for (let byte = 0; byte < 6; byte++) this.#shift();
  }

  #shift() {
    const isThere = this.place < this.payload.length;
    this.code = this.code * 256 + (isThere ? this.payload[this.place] : 0);
    this.slack = this.slack * 256 + (isThere ? 0 : 255);
    this.place++;
  }

  /** The code whose share comes next; starts: where each code's share starts, and 2^totalBits. */
  read(starts, totalBits) {
    const step = Math.floor(this.range / 2 ** totalBits),
      target = Math.floor(this.code / step);
    if (target >= 2 ** totalBits) throw new FormatError("The payload is damaged: no token is written so.");
    const code = indexOf(starts, target);
    this.code -= step * starts[code];
    this.range = step * (starts[code + 1] - starts[code]);
    if (this.code + this.slack >= this.range) this.isCertain = false;
    while (this.range < BOTTOM) {
      this.range *= 256;
      this.#shift();
    }
    return code;
  }
}

/** The last index whose start is not above the target. */
function indexOf(starts, target) {
  let first = 0,
    behind = starts.length - 1;
  while (behind - first > 1) {
    const middle = (first + behind) >> 1;
    if (starts[middle] <= target) first = middle;
    else behind = middle;
  }
  return first;
}
