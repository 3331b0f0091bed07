// The tokenizer's networks: an image to tokens, and any number of the first of them to an image.
//
// As modeling/titok.py, with the weights of a model.safetensors and its config.json. Matrices lie in the kernels'
// memory: rows of numbers, channels last.

import { Kernels, rounded } from "./kernels.js";
import { asFloats, readSafetensors } from "./safetensors.js";

const HEAD = 64; // channels of an attention head, in every published size
const LAYER_NORM_EPS = 1e-5,
  GROUP_NORM_EPS = 1e-6;

export class Tokenizer {
  /** config: the parsed config.json; weights: the ArrayBuffer of a model.safetensors; options: of `Kernels`. */
  constructor(config, weights, options = {}) {
    const { vq_model: sizes, pixel_vqgan: teacher } = config.model;
    this.side = config.dataset.preprocessing.crop_size;
    this.numTokens = sizes.num_latent_tokens;
    this.codebookSize = sizes.codebook_size;
    this.tokenSize = sizes.token_size;
    this.patch = sizes.vit_enc_patch_size;
    this.grid = this.side / sizes.vit_dec_patch_size;
    this.isLegacy = sizes.is_legacy ?? true;
    this.useL2Norm = sizes.use_l2_norm ?? true;
    this.levels = teacher.channel_multipliers.length;
    this.numResBlocks = teacher.num_res_blocks;
    this.normGroups = teacher.norm_groups;
    this.arrays = readSafetensors(weights).arrays;
    // Weights, some of them with filled columns, and what is computed: less than 4,096 numbers a pixel.
    this.kernels = new Kernels(weights.byteLength + 4096 * this.side ** 2, options);
    this.vectors = {}; // name: place in memory of what is no matrix
    this.matrices = {}; // name: {place, depth, columns} of a packed matrix
    this.buffers = {};
    this.#load();
    const widths = ["encoder", "decoder"].map((half) => this.arrays[`${half}.ln_pre.weight`].shape[0]);
    this.widest = Math.max(...widths);
    this.mostRows = rounded(1 + Math.max(this.grid ** 2, (this.side / this.patch) ** 2) + this.numTokens, 8) + 8;
    delete this.arrays;
  }

  #load() {
    for (const [name, { shape }] of Object.entries(this.arrays)) {
      if (name === "pixel_quantize.embedding.weight") this.#loadMatrix(name, shape[1], shape[0], true);
      else if (name === "quantize.embedding.weight") this.codebook = this.#codebook(name);
      else if (name.endsWith("in_proj_weight") || (shape.length > 1 && name.endsWith(".weight"))) {
        if (shape[2] === 3) this.#loadConvolution(name);
        else if (shape[2] > 1) this.#loadPatches(name);
        else this.#loadMatrix(name, shape[0], shape[1]);
      } else this.#loadVector(name);
    }
    for (const name of Object.keys(this.matrices)) {
      const bias = name.replace(/weight$/, "bias");
      this.matrices[name].bias = this.vectors[bias] ?? this.#reserve(this.matrices[name].columns);
    }
  }

  #reserve(size) {
    return this.kernels.reserve(size);
  }

  #loadVector(name) {
    const values = asFloats(this.arrays[name]);
    this.vectors[name] = this.#reserve(rounded(values.length, 8));
    this.kernels.floats.set(values, this.vectors[name]);
  }

  /** A linear layer's weight, (outputs, inputs), or already transposed. */
  #loadMatrix(name, outputs, inputs, isTransposed = false) {
    const rows = Int32Array.from({ length: inputs }, (_, k) => (isTransposed ? k * outputs : k));
    this.matrices[name] = this.#packed(asFloats(this.arrays[name]), outputs, rows, isTransposed ? 1 : inputs);
  }

  /** Arguments as of `Kernels.pack`. */
  #packed(values, outputs, rows, step) {
    const columns = rounded(outputs, 8),
      depth = rows.length,
      place = this.#reserve(depth * columns);
    this.kernels.pack(place, outputs, values, rows, step);
    return { place, depth, columns };
  }

  /** (outputs, inputs, 3, 3) as three matrices, one a row of the kernel: three neighbouring pixels to the outputs. */
  #loadConvolution(name) {
    const [outputs, inputs] = this.arrays[name].shape,
      values = asFloats(this.arrays[name]);
    const places = [0, 1, 2].map((row) => {
      const rows = Int32Array.from(
        { length: 3 * inputs },
        (_, k) => (k % inputs) * 9 + 3 * row + Math.floor(k / inputs),
      );
      return this.#packed(values, outputs, rows, 9 * inputs).place;
    });
    this.matrices[name] = { places, depth: 3 * inputs, columns: rounded(outputs, 8), inputs };
  }

  /** (outputs, 3, P, P) as a matrix whose rows are a patch's numbers, row by row, colours last. */
  #loadPatches(name) {
    const [outputs, colours, size] = this.arrays[name].shape,
      depth = colours * size * size;
    const rows = Int32Array.from({ length: depth }, (_, k) => (k % colours) * size * size + Math.floor(k / colours));
    this.matrices[name] = this.#packed(asFloats(this.arrays[name]), outputs, rows, depth);
  }

  #codebook(name) {
    const values = asFloats(this.arrays[name]).slice();
    if (this.useL2Norm) {
      for (let first = 0; first < values.length; first += this.tokenSize) normalise(values, first, this.tokenSize);
    }
    return values;
  }

  /** Room of so many numbers under a name, always as many, to be used again. */
  #buffer(name, size) {
    this.buffers[name] ??= this.#reserve(size);
    return this.buffers[name];
  }

  /** Rows of `channels` numbers, as many as a transformer ever has, and those that are computed to full steps. */
  #rows(name, channels) {
    return this.#buffer(name, this.mostRows * channels);
  }

  #linear(input, rows, name, output) {
    const { place, depth, columns, bias } = this.matrices[name];
    this.kernels.multiply(input, depth, place, bias, 0, output, columns, rounded(rows, 4), depth, columns);
  }

  // ------------------------------------------------------------------------------------------------ transformers

  #layerNorm(input, rows, name, output) {
    const { floats } = this.kernels,
      [scale, shift] = [this.vectors[`${name}.weight`], this.vectors[`${name}.bias`]];
    const width = this.width;
    for (let row = 0; row < rows; row++) {
      const from = input + row * width,
        to = output + row * width;
      let mean = 0,
        square = 0;
      for (let k = 0; k < width; k++) mean += floats[from + k];
      mean /= width;
      for (let k = 0; k < width; k++) square += (floats[from + k] - mean) ** 2;
      const factor = 1 / Math.sqrt(square / width + LAYER_NORM_EPS);
      for (let k = 0; k < width; k++)
        floats[to + k] = (floats[from + k] - mean) * factor * floats[scale + k] + floats[shift + k];
    }
  }

  #transformer(half, x, rows) {
    const { kernels, width, widest } = this;
    const normed = this.#rows("normed", widest),
      mixed = this.#rows("mixed", widest),
      wide = this.#rows("wide", 4 * widest);
    this.#layerNorm(x, rows, `${half}.ln_pre`, x);
    for (let layer = 0; `${half}.transformer.${layer}.ln_1.weight` in this.vectors; layer++) {
      const block = `${half}.transformer.${layer}`;
      this.#layerNorm(x, rows, `${block}.ln_1`, normed);
      this.#linear(normed, rows, `${block}.attn.in_proj_weight`, wide);
      this.#attention(wide, rows, normed);
      this.#linear(normed, rows, `${block}.attn.out_proj.weight`, mixed);
      add(kernels.floats, x, mixed, rows * width);
      this.#layerNorm(x, rows, `${block}.ln_2`, normed);
      this.#linear(normed, rows, `${block}.mlp.c_fc.weight`, wide);
      gelu(kernels.floats, wide, rows * 4 * width);
      this.#linear(wide, rows, `${block}.mlp.c_proj.weight`, mixed);
      add(kernels.floats, x, mixed, rows * width);
    }
  }

  /** From rows of queries, keys and values, (rows, 3 width), to (rows, width). */
  #attention(qkv, rows, output) {
    const { kernels, width } = this,
      room = rounded(rows, 8);
    const keys = this.#rows("keys", HEAD),
      values = this.#rows("values", HEAD);
    const scores = this.#rows("scores", this.mostRows),
      zeros = this.#rows("zeros", HEAD);
    for (let head = 0; head < width; head += HEAD) {
      const { floats } = kernels,
        at = (row, part) => qkv + (3 * row + part) * width + head;
      kernels.pack(
        keys,
        rows,
        floats,
        Array.from({ length: HEAD }, (_, k) => at(0, 1) + k),
        3 * width,
      );
      floats.fill(0, values, values + room * HEAD);
      for (let first = 0; first < HEAD; first += 8) {
        for (let row = 0; row < rows; row++) {
          const from = at(row, 2) + first;
          floats.copyWithin(values + first * room + row * 8, from, from + 8);
        }
      }
      kernels.multiply(qkv + head, 3 * width, keys, zeros, 0, scores, room, rounded(rows, 4), HEAD, room);
      for (let row = 0; row < rows; row++) softmax(floats, scores + row * room, rows, room, HEAD ** -0.5);
      kernels.multiply(scores, room, values, zeros, 0, output + head, width, rounded(rows, 4), room, HEAD);
    }
  }

  /** Tokens (N) of an image: bytes of red, green and blue, pixel by pixel. */
  encode(pixels) {
    const { kernels, side, patch, numTokens } = this,
      across = side / patch,
      patches = across ** 2;
    const rows = 1 + patches + numTokens,
      depth = patch * patch * 3;
    this.width = this.matrices["encoder.patch_embed.weight"].columns;
    const { width } = this;
    const x = this.#rows("x", this.widest),
      cut = this.#buffer("patches", rounded(patches, 4) * depth);
    for (let index = 0; index < patches; index++) {
      const top = Math.floor(index / across) * patch,
        left = (index % across) * patch;
      for (let row = 0; row < patch; row++) {
        const from = ((top + row) * side + left) * 3,
          to = cut + index * depth + row * patch * 3;
        for (let k = 0; k < patch * 3; k++) kernels.floats[to + k] = pixels[from + k] / 255;
      }
    }
    this.#linear(cut, patches, "encoder.patch_embed.weight", x + width); // rows behind are written next
    const { floats } = kernels,
      { vectors } = this;
    floats.copyWithin(x, vectors["encoder.class_embedding"], vectors["encoder.class_embedding"] + width);
    add(floats, x, vectors["encoder.positional_embedding"], (1 + patches) * width);
    const latents = x + (1 + patches) * width;
    floats.copyWithin(latents, vectors.latent_tokens, vectors.latent_tokens + numTokens * width);
    add(floats, latents, vectors["encoder.latent_token_positional_embedding"], numTokens * width);
    this.#transformer("encoder", x, rows);
    return this.#nearest(this.#encoded(latents));
  }

  /** Vectors (N, C) of the encoder's last features, (N, width). */
  #encoded(latents) {
    const { kernels, width, numTokens } = this;
    const normed = this.#rows("normed", this.widest),
      turned = this.#rows("wide", 4 * this.widest);
    this.#layerNorm(latents, numTokens, "encoder.ln_post", normed);
    let last = normed;
    if (this.isLegacy) {
      // the published weights read the memory of (N, width) as (width, N)
      for (let row = 0; row < numTokens; row++) {
        for (let k = 0; k < width; k++)
          kernels.floats[turned + row * width + k] = kernels.floats[normed + k * numTokens + row];
      }
      last = turned;
    }
    const { columns } = this.matrices["encoder.conv_out.weight"];
    const output = this.#buffer("encoded", rounded(numTokens, 4) * columns);
    this.#linear(last, numTokens, "encoder.conv_out.weight", output);
    return Array.from({ length: numTokens }, (_, row) =>
      kernels.floats.slice(output + row * columns, output + row * columns + this.tokenSize),
    );
  }

  #nearest(vectors) {
    const { codebook, tokenSize, codebookSize } = this;
    return vectors.map((vector) => {
      if (this.useL2Norm) normalise(vector, 0, tokenSize);
      let best = 0,
        least = Infinity;
      for (let code = 0; code < codebookSize; code++) {
        let distance = 0; // less |vector|^2, which is the same for all
        for (let k = 0; k < tokenSize; k++) {
          const value = codebook[code * tokenSize + k];
          distance += value * (value - 2 * vector[k]);
        }
        if (distance < least) [best, least] = [code, distance];
      }
      return best;
    });
  }

  /** Bytes of red, green and blue, pixel by pixel, of the first tokens of an image: 1 to N of them. */
  decode(tokens) {
    const { kernels, tokenSize, grid } = this,
      cells = grid ** 2,
      rows = 1 + cells + tokens.length;
    this.width = this.matrices["decoder.decoder_embed.weight"].columns;
    const { width, vectors } = this;
    const x = this.#rows("x", this.widest),
      codes = this.#rows("codes", tokenSize);
    tokens.forEach((token, row) =>
      kernels.floats.set(this.codebook.subarray(token * tokenSize, (token + 1) * tokenSize), codes + row * tokenSize),
    );
    const latents = x + (1 + cells) * width;
    this.#linear(codes, tokens.length, "decoder.decoder_embed.weight", latents);
    const { floats } = kernels;
    add(floats, latents, vectors["decoder.latent_token_positional_embedding"], tokens.length * width);
    floats.copyWithin(x, vectors["decoder.class_embedding"], vectors["decoder.class_embedding"] + width);
    for (let row = 1; row <= cells; row++) {
      floats.copyWithin(x + row * width, vectors["decoder.mask_token"], vectors["decoder.mask_token"] + width);
    }
    add(floats, x, vectors["decoder.positional_embedding"], (1 + cells) * width);
    this.#transformer("decoder", x, rows);
    return this.#pixels(this.#pixelVectors(x + width, cells));
  }

  /** Of the features of the grid's cells the expected vectors of the pixel codes, (cells, channels). */
  #pixelVectors(features, cells) {
    const { kernels } = this,
      normed = this.#rows("normed", this.widest);
    const hidden = this.matrices["decoder.ffn.0.weight"].columns,
      codes = this.matrices["decoder.ffn.2.weight"].columns;
    const first = this.#buffer("ffn", cells * hidden),
      logits = this.#buffer("logits", cells * codes);
    const output = this.#buffer("pixels", cells * this.matrices["pixel_quantize.embedding.weight"].columns);
    this.#layerNorm(features, cells, "decoder.ln_post", normed);
    this.#linear(normed, cells, "decoder.ffn.0.weight", first);
    for (let k = first; k < first + cells * hidden; k++) kernels.floats[k] = Math.tanh(kernels.floats[k]);
    this.#linear(first, cells, "decoder.ffn.2.weight", logits);
    for (let row = 0; row < cells; row++) softmax(kernels.floats, logits + row * codes, codes, codes, 1);
    this.#linear(logits, cells, "pixel_quantize.embedding.weight", output);
    return output;
  }

  // ------------------------------------------------------------------------------------------------ convolutions

  /** The image of the grid's vectors. */
  #pixels(z) {
    let side = this.grid,
      x = this.#buffer("level0", side * side * this.matrices["pixel_decoder.conv_in.weight"].columns);
    const base = "pixel_decoder";
    this.#convolution(
      this.#framed(z, side, this.matrices[`${base}.conv_in.weight`].inputs),
      side,
      `${base}.conv_in.weight`,
      x,
    );
    for (let block = 0; block < this.numResBlocks; block++) x = this.#residual(x, side, `${base}.mid.${block}`);
    for (let level = this.levels - 1; level >= 0; level--) {
      for (let block = 0; block < this.numResBlocks; block++)
        x = this.#residual(x, side, `${base}.up.${level}.block.${block}`);
      if (level === 0) break;
      const name = `${base}.up.${level}.upsample_conv.weight`,
        { inputs, columns } = this.matrices[name];
      side *= 2;
      const larger = this.#buffer(`up${level}`, side * side * columns);
      this.#convolution(this.#framed(x, side, inputs, 2), side, name, larger);
      x = larger;
    }
    const { inputs, columns } = this.matrices[`${base}.conv_out.weight`];
    const output = this.#buffer("image", side * side * columns);
    this.#convolution(
      this.#normedAndFramed(x, side, inputs, `${base}.norm_out`),
      side,
      `${base}.conv_out.weight`,
      output,
    );
    const pixels = new Uint8ClampedArray(side * side * 3),
      { floats } = this.kernels;
    // Clamped and rounded, halves to even, by the array.
    for (let k = 0; k < pixels.length; k++) pixels[k] = 255 * floats[output + Math.floor(k / 3) * columns + (k % 3)];
    return pixels;
  }

  #residual(x, side, name) {
    const first = this.matrices[`${name}.conv1.weight`],
      second = this.matrices[`${name}.conv2.weight`];
    const size = side * side * second.columns;
    const middle = this.#buffer(`middle${side}`, size),
      output = this.#buffer(`${name}`, size);
    this.#convolution(
      this.#normedAndFramed(x, side, first.inputs, `${name}.norm1`),
      side,
      `${name}.conv1.weight`,
      middle,
    );
    this.#convolution(
      this.#normedAndFramed(middle, side, second.inputs, `${name}.norm2`),
      side,
      `${name}.conv2.weight`,
      output,
    );
    if (`${name}.nin_shortcut.weight` in this.matrices) {
      // it reads the block's own output
      this.#linear(output, side * side, `${name}.nin_shortcut.weight`, middle);
      x = middle;
    }
    add(this.kernels.floats, output, x, size);
    return output;
  }

  /** 3 x 3, of an image with a frame of zeros: for every row of it three products, whose rows overlap. */
  #convolution(framed, side, name, output) {
    const { places, depth, columns, inputs, bias } = this.matrices[name],
      stride = (side + 2) * inputs;
    for (let row = 0; row < side; row++) {
      const to = output + row * side * columns;
      places.forEach((place, k) =>
        this.kernels.multiply(
          framed + (row + k) * stride,
          inputs,
          place,
          k ? to : bias,
          k ? columns : 0,
          to,
          columns,
          side,
          depth,
          columns,
        ),
      );
    }
  }

  /** A copy with a frame of zeros, to `side` after each pixel was repeated `times` across and down. */
  #framed(x, side, channels, times = 1) {
    const { floats } = this.kernels,
      stride = (side + 2) * channels;
    const framed = this.#frame(side, channels);
    for (let row = 0; row < side; row++) {
      for (let column = 0; column < side; column++) {
        const from = x + (Math.floor(row / times) * (side / times) + Math.floor(column / times)) * channels;
        floats.copyWithin(framed + (row + 1) * stride + (column + 1) * channels, from, from + channels);
      }
    }
    return framed;
  }

  #frame(side, channels) {
    return this.#buffer(`frame${side}x${channels}`, (side + 2) ** 2 * channels); // its rim stays 0
  }

  /** GroupNorm, then SiLU, with a frame of zeros. */
  #normedAndFramed(x, side, channels, name) {
    const framed = this.#frame(side, channels),
      { floats } = this.kernels;
    const scale = this.vectors[`${name}.weight`],
      shift = this.vectors[`${name}.bias`],
      stride = (side + 2) * channels;
    const { factor, offset } = groupStatistics(floats, x, side * side, channels, this.normGroups);
    for (let channel = 0; channel < channels; channel++) {
      // one factor and offset a channel
      factor[channel] *= floats[scale + channel];
      offset[channel] = offset[channel] * floats[scale + channel] + floats[shift + channel];
    }
    for (let row = 0; row < side; row++) {
      let from = x + row * side * channels,
        to = framed + (row + 1) * stride + channels;
      for (let column = 0; column < side; column++) {
        for (let channel = 0; channel < channels; channel++) {
          const value = floats[from++] * factor[channel] + offset[channel];
          floats[to++] = value / (1 + Math.exp(-value));
        }
      }
    }
    return framed;
  }
}

/** Of each channel what its group's values are multiplied with and what is added, to mean 0 and variance 1. */
function groupStatistics(floats, x, pixels, channels, groups) {
  const sums = new Float64Array(channels),
    squares = new Float64Array(channels),
    size = channels / groups;
  for (let pixel = 0, place = x; pixel < pixels; pixel++) {
    for (let channel = 0; channel < channels; channel++) {
      const value = floats[place++];
      sums[channel] += value;
      squares[channel] += value * value;
    }
  }
  const factor = new Float64Array(channels),
    offset = new Float64Array(channels);
  for (let first = 0; first < channels; first += size) {
    let sum = 0,
      square = 0;
    for (let channel = first; channel < first + size; channel++)
      [sum, square] = [sum + sums[channel], square + squares[channel]];
    const mean = sum / (pixels * size),
      variance = square / (pixels * size) - mean * mean;
    factor.fill(1 / Math.sqrt(variance + GROUP_NORM_EPS), first, first + size);
    offset.fill(-mean / Math.sqrt(variance + GROUP_NORM_EPS), first, first + size);
  }
  return { factor, offset };
}

function normalise(values, first, size) {
  let square = 0;
  for (let k = first; k < first + size; k++) square += values[k] * values[k];
  const length = Math.max(Math.sqrt(square), 1e-12);
  for (let k = first; k < first + size; k++) values[k] /= length;
}

function add(floats, to, from, size) {
  for (let k = 0; k < size; k++) floats[to + k] += floats[from + k];
}

/** Of `scale` times the first `count` numbers of a row; the others become 0. */
function softmax(floats, place, count, room, scale) {
  let most = -Infinity,
    sum = 0;
  for (let k = place; k < place + count; k++) most = Math.max(most, floats[k]);
  for (let k = place; k < place + count; k++) sum += floats[k] = Math.exp(scale * (floats[k] - most));
  for (let k = place; k < place + count; k++) floats[k] /= sum;
  floats.fill(0, place + count, place + room);
}

/** x times the normal distribution's share below x. */
function gelu(floats, place, size) {
  for (let k = place; k < place + size; k++) {
    const x = floats[k],
      z = Math.abs(x) * Math.SQRT1_2,
      t = 1 / (1 + 0.3275911 * z);
    // 1 - erf(z) to 1.5e-7: Abramowitz and Stegun, 7.1.26
    const tail =
      t *
      (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))) *
      Math.exp(-z * z);
    floats[k] = x > 0 ? x * (1 - tail / 2) : (x * tail) / 2;
  }
}
