// Files of arrays: 8 bytes with the length of what follows, JSON that says what is where, then the numbers.

const TYPES = { I8: Int8Array, I32: Int32Array, U16: Uint16Array, F32: Float32Array, F16: Uint16Array };

/** {metadata, arrays: {name: {dtype, shape, bytes, values}}} of a file's ArrayBuffer; F16 as the bits that it has. */
export function readSafetensors(buffer) {
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  const entries = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  const { __metadata__: metadata = {}, ...rest } = entries;
  const arrays = {};
  for (const [
    name,
    {
      dtype,
      shape,
      data_offsets: [first, last],
    },
  ] of Object.entries(rest)) {
    const bytes = new Uint8Array(buffer, 8 + size + first, last - first);
    arrays[name] = { dtype, shape, bytes, values: new TYPES[dtype](bytes.slice().buffer) };
  }
  return { metadata, arrays };
}

let halves; // the 65,536 numbers of 16 bits

/** Float32Array of an array of type F16 or F32. */
export function asFloats({ dtype, values }) {
  if (dtype === "F32") return values;
  halves ??= Float32Array.from({ length: 65536 }, (_, bits) => {
    const sign = bits >> 15 ? -1 : 1,
      exponent = (bits >> 10) & 31,
      fraction = bits & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  });
  const floats = new Float32Array(values.length);
  for (let k = 0; k < floats.length; k++) floats[k] = halves[values[k]];
  return floats;
}
