// Matrix products in WebAssembly, assembled here: 4 rows x 8 columns at a time, 4 numbers an instruction.
//
// Plain JavaScript takes 8 times as long (docs/page.md); it is what runs where there is no SIMD.

const I32 = 0x7f,
  V128 = 0x7b;
const ROWS = 4,
  COLUMNS = 8,
  DEPTH = 4; // of a step: sizes of matrices are multiples of these
const WASM_PAGE = 65536; // bytes of a page of memory

const unsigned = (value) => (value < 128 ? [value] : [(value & 127) | 128, ...unsigned(value >>> 7)]);
const vector = (items) => [...unsigned(items.length), ...items.flat()];
const section = (id, content) => [id, ...unsigned(content.length), ...content];
const text = (value) => vector([...new TextEncoder().encode(value)]);

const get = (local) => [0x20, local];
const set = (local, ...value) => [...value.flat(), 0x21, local];
const number = (value) => [0x41, ...(value < 64 ? [value] : [(value & 127) | 128, value >> 7])]; // up to 2^13
const sum = (left, right) => [...left, ...right, 0x6a];
const times4 = (value) => [...value, ...number(2), 0x74];
const simd = (code) => [0xfd, ...unsigned(code)];
const load = (address, offset) => [...address, ...simd(0x00), 2, ...unsigned(offset)];
const spread = (address, offset) => [...address, ...simd(0x09), 2, ...unsigned(offset)]; // one number, four times
const store = (address, offset, value) => [...address, ...value, ...simd(0x0b), 2, ...unsigned(offset)];
const multiplyAdd = (total, left, right) => set(total, get(total), left, right, simd(0xe6), simd(0xe4));
/** Repeat `body` as long as `counter`, less `step` each time, is not 0. */
const repeat = (counter, step, body) => [
  0x03,
  0x40,
  ...body.flat(Infinity),
  ...get(counter),
  ...number(step),
  0x6b,
  0x22,
  counter,
  0x0d,
  0,
  0x0b,
];

const PARAMETERS = ["a", "aStep", "b", "start", "startStep", "c", "cStep", "rows", "depth", "columns"];
const POINTERS = ["aRow", "startRow", "cRow", "rowsLeft", "depthLeft", "place", "p0", "p1", "p2", "p3"];
const AT = Object.fromEntries([...PARAMETERS, ...POINTERS].map((name, index) => [name, index]));
const FIRST_SUM = PARAMETERS.length + POINTERS.length; // then two for each row, and what is multiplied
const LEFT = FIRST_SUM + 2 * ROWS;
const RIGHT = LEFT + 1;

/** For each of the rows of a block its pointer into a, and its two sums of four columns. */
const eachRow = (make) => Array.from({ length: ROWS }, (_, row) => make(AT.p0 + row, FIRST_SUM + 2 * row, row));

/** Four rows of a, and eight columns of b from there: set the sums, add up all products, write the sums. */
function block() {
  const products = Array.from({ length: DEPTH }, (_, k) => [
    set(LEFT, load(get(AT.place), 32 * k)),
    set(RIGHT, load(get(AT.place), 32 * k + 16)),
    eachRow((pointer, sums) => [
      multiplyAdd(sums, spread(get(pointer), 4 * k), get(LEFT)),
      multiplyAdd(sums + 1, spread(get(pointer), 4 * k), get(RIGHT)),
    ]),
  ]);
  return [
    eachRow((pointer, _, row) => set(pointer, row ? sum(get(pointer - 1), get(AT.aStep)) : get(AT.aRow))),
    eachRow((_, sums) => [
      set(sums, load(get(AT.startRow), 0)),
      set(sums + 1, load(get(AT.startRow), 16)),
      set(AT.startRow, sum(get(AT.startRow), get(AT.startStep))),
    ]),
    set(AT.place, get(AT.b)),
    set(AT.depthLeft, get(AT.depth)),
    repeat(AT.depthLeft, DEPTH, [
      products,
      set(AT.place, sum(get(AT.place), number(32 * DEPTH))),
      eachRow((pointer) => set(pointer, sum(get(pointer), number(4 * DEPTH)))),
    ]),
    eachRow((_, sums) => [
      store(get(AT.cRow), 0, get(sums)),
      store(get(AT.cRow), 16, get(sums + 1)),
      set(AT.cRow, sum(get(AT.cRow), get(AT.cStep))),
    ]),
    set(AT.aRow, sum(get(AT.aRow), times4(get(AT.aStep)))),
  ];
}

/** All rows, eight columns. */
function panel() {
  return [
    set(AT.aRow, get(AT.a)),
    set(AT.startRow, get(AT.start)),
    set(AT.cRow, get(AT.c)),
    set(AT.rowsLeft, get(AT.rows)),
    repeat(AT.rowsLeft, ROWS, block()),
    set(AT.b, get(AT.place)),
    set(AT.start, sum(get(AT.start), number(32))),
    set(AT.c, sum(get(AT.c), number(32))),
  ];
}

/** The bytes of a module with the function `multiply` of ten numbers: see `Kernels.multiply`. */
function assembled() {
  const locals = vector([
    [...unsigned(POINTERS.length), I32],
    [...unsigned(RIGHT + 1 - FIRST_SUM), V128],
  ]);
  const body = [...locals, ...repeat(AT.columns, COLUMNS, panel()), 0x0b];
  const numbers = vector(PARAMETERS.map(() => [I32]));
  return new Uint8Array([
    ...[0, 0x61, 0x73, 0x6d, 1, 0, 0, 0],
    ...section(1, vector([[0x60, ...numbers, 0]])), // type: ten numbers to none
    ...section(2, vector([[...text("page"), ...text("memory"), 2, 0, 1]])), // import: memory
    ...section(3, vector([[0]])), // function: of the first type
    ...section(7, vector([[...text("multiply"), 0, 0]])), // export
    ...section(10, vector([[...unsigned(body.length), ...body]])),
  ]);
}

export const rounded = (size, multiple) => Math.ceil(size / multiple) * multiple;

/**
 * Memory for matrices of float32, and their products. A matrix is known by its place, in numbers, not bytes.
 *
 * `size`: how many numbers there is room for. The system gives memory as it is touched.
 */
export class Kernels {
  constructor(size, { withSimd = true } = {}) {
    const memory = new WebAssembly.Memory({ initial: Math.ceil((4 * size) / WASM_PAGE) });
    const bytes = assembled();
    this.hasSimd = withSimd && WebAssembly.validate(bytes);
    if (this.hasSimd) {
      const instance = new WebAssembly.Instance(new WebAssembly.Module(bytes), { page: { memory } });
      this.native = instance.exports.multiply;
    }
    this.floats = new Float32Array(memory.buffer);
    this.used = 0;
  }

  /** The place of room for so many numbers, all 0. */
  reserve(size) {
    const place = this.used;
    this.used += rounded(size, COLUMNS);
    if (this.used > this.floats.length) throw new Error("the kernels' memory is too small for this model");
    return place;
  }

  /**
   * c = start + a b. Rows are a multiple of 4, depth of 4, columns of 8.
   *
   * a has its rows `aStep` numbers apart, c and start likewise (0: one row for all). b is packed, see `pack`.
   */
  multiply(a, aStep, b, start, startStep, c, cStep, rows, depth, columns) {
    if (this.hasSimd) {
      this.native(4 * a, 4 * aStep, 4 * b, 4 * start, 4 * startStep, 4 * c, 4 * cStep, rows, depth, columns);
      return;
    }
    const { floats } = this,
      sums = new Float64Array(COLUMNS);
    for (let column = 0; column < columns; column += COLUMNS) {
      for (let row = 0; row < rows; row++) {
        const from = start + row * startStep + column,
          to = c + row * cStep + column;
        for (let k = 0; k < COLUMNS; k++) sums[k] = floats[from + k];
        let place = b + column * depth;
        for (let k = a + row * aStep; k < a + row * aStep + depth; k++) {
          const value = floats[k];
          for (let j = 0; j < COLUMNS; j++) sums[j] += value * floats[place++];
        }
        for (let k = 0; k < COLUMNS; k++) floats[to + k] = sums[k];
      }
    }
  }

  /**
   * Write b as `multiply` takes it: for every 8 columns all its rows of 8 numbers. Columns that are missing to 8 stay.
   *
   * `values[rows[k] + j * step]` is its number in row k and column j.
   */
  pack(place, columns, values, rows, step) {
    const { floats } = this,
      depth = rows.length;
    for (let first = 0; first < columns; first += COLUMNS) {
      const count = Math.min(COLUMNS, columns - first);
      for (let row = 0; row < depth; row++, place += COLUMNS) {
        const from = rows[row] + first * step;
        for (let column = 0; column < count; column++) floats[place + column] = values[from + column * step];
      }
    }
  }
}
