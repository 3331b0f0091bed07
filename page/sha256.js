// SHA-256 (FIPS 180-4). A browser has its own only where a page came over https.

const ROOTS = primes(64).map((prime) => fraction(Math.cbrt(prime)));
const START = primes(8).map((prime) => fraction(Math.sqrt(prime)));

function primes(count) {
  const found = [];
  for (let value = 2; found.length < count; value++) if (found.every((prime) => value % prime)) found.push(value);
  return found;
}

function fraction(value) {
  return Math.floor((value % 1) * 2 ** 32) | 0;
}

const turned = (value, bits) => (value >>> bits) | (value << (32 - bits));

/** The 32 bytes of a hash of texts and bytes, one after the other. */
export function sha256(parts) {
  const pieces = parts.map((part) => (typeof part === "string" ? new TextEncoder().encode(part) : part));
  const size = pieces.reduce((sum, piece) => sum + piece.length, 0);
  const message = new Uint8Array(Math.ceil((size + 9) / 64) * 64),
    view = new DataView(message.buffer);
  pieces.reduce((place, piece) => (message.set(piece, place), place + piece.length), 0);
  message[size] = 0x80;
  view.setBigUint64(message.length - 8, BigInt(size) * 8n);
  const state = Int32Array.from(START),
    words = new Int32Array(64);
  for (let block = 0; block < message.length; block += 64) digest(state, words, view, block);
  const result = new DataView(new ArrayBuffer(32));
  state.forEach((value, index) => result.setInt32(4 * index, value));
  return new Uint8Array(result.buffer);
}

function digest(state, words, view, block) {
  for (let k = 0; k < 16; k++) words[k] = view.getInt32(block + 4 * k);
  for (let k = 16; k < 64; k++) {
    const early = words[k - 15],
      late = words[k - 2];
    const low = turned(early, 7) ^ turned(early, 18) ^ (early >>> 3),
      high = turned(late, 17) ^ turned(late, 19) ^ (late >>> 10);
    words[k] = words[k - 16] + low + words[k - 7] + high;
  }
  let [a, b, c, d, e, f, g, h] = state;
  for (let k = 0; k < 64; k++) {
    const first = (h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & f) ^ (~e & g)) + ROOTS[k] + words[k]) | 0;
    const second = ((turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
    [h, g, f, e, d, c, b, a] = [g, f, e, (d + first) | 0, c, b, a, (first + second) | 0];
  }
  [a, b, c, d, e, f, g, h].forEach((value, index) => (state[index] += value));
}
