// Images of any size as the square that a model takes, as Pillow and codec/canvas.py make it; and tiles as one image.
//
// An image is {width, height, pixels}: bytes of red, green and blue, row by row.

const PRECISION = 2 ** 22; // of the weights of a resampling in integers

/** An image of bytes of red, green, blue and opacity, laid on white. */
export function onWhite({ width, height, data }) {
  const pixels = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    const opacity = data[from + 3] * 128,
      rest = 255 * 128 - opacity;
    for (let colour = 0; colour < 3; colour++) {
      const sum = data[from + colour] * opacity + 255 * rest + (128 << 7);
      pixels[to++] = (((sum >> 8) + sum) >> 8) >> 7;
    }
  }
  return { width, height, pixels };
}

/** {square, box, geometry} of an image: box is where it lies in the square, geometry null where it fills it as it is. */
export function toSquare(image, fit, side) {
  const { width, height } = image,
    whole = [0, 0, side, side];
  if (width === side && height === side) return { square: image.pixels, box: whole, geometry: null };
  const geometry = { fit, orientation: 1, width, height, tiles: null };
  const fits = [croppedSquare, paddedSquare, (given, size) => resized(given, size, size).pixels];
  return { square: fits[fit](image, side), box: fit === 1 ? paddedBox(width, height, side) : whole, geometry };
}

function croppedSquare(image, side) {
  const shorter = Math.min(image.width, image.height);
  const scaled = resized(
    image,
    Math.floor((image.width * side) / shorter),
    Math.floor((image.height * side) / shorter),
  );
  const left = halfToEven((scaled.width - side) / 2),
    top = halfToEven((scaled.height - side) / 2);
  return cut(scaled, left, top, side);
}

function paddedSquare(image, side) {
  const [left, top, right, bottom] = paddedBox(image.width, image.height, side);
  return cut(resized(image, right - left, bottom - top), -left, -top, side);
}

/** Left, top, right and bottom of an image in the middle of a square. */
export function paddedBox(width, height, side) {
  const longer = Math.max(width, height);
  const [across, down] = [width, height].map((length) => Math.max(1, halfToEven((side * length) / longer)));
  const left = Math.floor((side - across) / 2),
    top = Math.floor((side - down) / 2);
  return [left, top, left + across, top + down];
}

function halfToEven(value) {
  const below = Math.floor(value),
    rest = value - below;
  return rest < 0.5 || (rest === 0.5 && below % 2 === 0) ? below : below + 1;
}

/** A square out of an image; what is beyond its edges is as they are. */
function cut({ width, height, pixels }, left, top, side) {
  const square = new Uint8Array(side * side * 3);
  for (let row = 0; row < side; row++) {
    const y = Math.min(height - 1, Math.max(0, top + row));
    for (let column = 0; column < side; column++) {
      const from = 3 * (y * width + Math.min(width - 1, Math.max(0, left + column))),
        to = 3 * (row * side + column);
      for (let colour = 0; colour < 3; colour++) square[to + colour] = pixels[from + colour];
    }
  }
  return square;
}

/** Bicubic with antialias, on bytes, across and then down, as Pillow's `resize` does (but for tall images, where it begins down). */
export function resized(image, width, height) {
  const across = image.width === width ? image : resampled(image, width, true);
  return image.height === height ? across : resampled(across, height, false);
}

function resampled({ width, height, pixels }, size, isAcross) {
  const weights = weightsOf(isAcross ? width : height, size);
  const result = isAcross ? { width: size, height } : { width, height: size },
    step = isAcross ? 3 : 3 * width;
  result.pixels = new Uint8ClampedArray(result.width * result.height * 3);
  for (let row = 0, to = 0; row < result.height; row++) {
    for (let column = 0; column < result.width; column++) {
      const { first, values } = weights[isAcross ? column : row];
      const from = 3 * (isAcross ? row * width + first : first * width + column);
      for (let colour = 0; colour < 3; colour++) {
        let sum = PRECISION / 2;
        for (let k = 0, place = from + colour; k < values.length; k++, place += step) sum += pixels[place] * values[k];
        result.pixels[to++] = Math.floor(sum / PRECISION);
      }
    }
  }
  return result;
}

/** For each of `size` pixels the first of `length` that it is made of, and their weights. */
function weightsOf(length, size) {
  const scale = length / size,
    reach = Math.max(scale, 1),
    support = 2 * reach;
  return Array.from({ length: size }, (_, index) => {
    const centre = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5)),
      behind = Math.min(length, Math.trunc(centre + support + 0.5));
    const values = Array.from({ length: behind - first }, (_, k) => bicubic((k + first - centre + 0.5) / reach));
    const sum = values.reduce((a, b) => a + b, 0);
    return {
      first,
      values: Int32Array.from(values, (value) => Math.trunc((value / sum) * PRECISION + (value < 0 ? -0.5 : 0.5))),
    };
  });
}

function bicubic(x) {
  const a = -0.5,
    z = Math.abs(x);
  if (z < 1) return ((a + 2) * z - (a + 3)) * z * z + 1;
  return z < 2 ? (((z - 5) * z + 8) * z - 4) * a : 0;
}

// ------------------------------------------------------------------------------------------------ tiles

/** An image scaled down so that its longer side has at most so many pixels. */
export function withinSide(image, most) {
  const longer = Math.max(image.width, image.height);
  if (longer <= most) return image;
  const [width, height] = [image.width, image.height].map((side) => Math.max(1, Math.round((side * most) / longer)));
  return resized(image, width, height);
}

/**
 * {squares, geometry} of an image cut into tiles, row by row; neighbours share an eighth of their side at least.
 *
 * geometry is null where the image is one square as it is.
 */
export function toTiles(image, side) {
  const { width, height } = image,
    overlap = Math.floor(side / 8);
  if (width === side && height === side) return { squares: [image.pixels], geometry: null };
  const [columns, rows] = [width, height].map((length) =>
    Math.max(1, Math.ceil((length - overlap) / (side - overlap))),
  );
  const tops = starts(height, side, rows),
    lefts = starts(width, side, columns);
  const squares = tops.flatMap((top) => lefts.map((left) => cut(image, left, top, side)));
  return { squares, geometry: { fit: 3, orientation: 1, width, height, tiles: { columns, rows, lengths: [] } } };
}

/** Width and height of an image as it is shown, of a file's geometry. */
export function shownSize({ width, height, orientation }) {
  return orientation > 4 ? [height, width] : [width, height];
}

/** The tiles of an image, blended; squares: of each tile its bytes, or null where nothing is known of it: grey. */
export function blended(squares, geometry, side) {
  const [width, height] = shownSize(geometry),
    { columns, rows } = geometry.tiles;
  const sums = new Float32Array(width * height * 4),
    lefts = starts(width, side, columns),
    tops = starts(height, side, rows);
  const weights = Float32Array.from({ length: side }, (_, k) =>
    Math.min(1, (8 * (Math.min(k, side - 1 - k) + 0.5)) / side),
  );
  squares.forEach((square, tile) => {
    if (square)
      addTile(sums, width, height, square, weights, lefts[tile % columns], tops[Math.floor(tile / columns)], side);
  });
  const pixels = new Uint8ClampedArray(width * height * 3).fill(128);
  for (let pixel = 0; pixel < width * height; pixel++) {
    const weight = sums[4 * pixel + 3];
    for (let colour = 0; weight > 0 && colour < 3; colour++)
      pixels[3 * pixel + colour] = sums[4 * pixel + colour] / weight;
  }
  return { width, height, pixels };
}

function addTile(sums, width, height, square, weights, left, top, side) {
  for (let row = 0; row < side && top + row < height; row++) {
    for (let column = 0; column < side && left + column < width; column++) {
      const weight = weights[row] * weights[column],
        to = 4 * ((top + row) * width + left + column),
        from = 3 * (row * side + column);
      for (let colour = 0; colour < 3; colour++) sums[to + colour] += weight * square[from + colour];
      sums[to + 3] += weight;
    }
  }
}

/** First pixels of tiles that are spread evenly over a line. */
function starts(length, side, count) {
  const reach = Math.max(0, length - side);
  return Array.from({ length: count }, (_, index) => (count > 1 ? Math.floor((index * reach) / (count - 1)) : 0));
}

/** Whether tiles cover their image, and are no more than it has pixels. */
export function covers(geometry, side) {
  const [width, height] = shownSize(geometry),
    { columns, rows } = geometry.tiles;
  return columns * side >= width && rows * side >= height && columns <= width && rows <= height;
}
