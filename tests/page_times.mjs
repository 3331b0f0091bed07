// CPU time of the page's networks, on one thread, the least of some runs: node tests/page_times.mjs [FOLDER]
//
// FOLDER has onnxruntime-web in node_modules and a model by scripts/export_onnx.py in onnx: measured likewise.

import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { fileURLToPath } from "node:url";

import { Tokenizer } from "../page/tokenizer.js";

const RUNS = 30;
const model = fileURLToPath(new URL("../assets/models/one-d-piece_emoji/", import.meta.url));
const tokens = Array.from({ length: 32 }, (_, place) => 31 * place);

async function milliseconds(runs, work) {
  let least = Infinity;
  for (let run = 0; run < runs; run++) {
    const before = process.cpuUsage();
    await work();
    const { user, system } = process.cpuUsage(before);
    least = Math.min(least, (user + system) / 1000);
  }
  return least;
}

async function measure(name, load, encode, decode) {
  const loaded = await milliseconds(1, load);
  const times = [
    await milliseconds(RUNS, encode),
    await milliseconds(RUNS, () => decode(32)),
    await milliseconds(RUNS, () => decode(8)),
  ];
  const [encoded, whole, part] = times.map((time) => time.toFixed(1));
  console.log(
    `${name}: load ${loaded.toFixed(0)} ms, encode ${encoded} ms, decode 32 tokens ${whole} ms, 8 tokens ${part} ms`,
  );
}

let tokenizer;
for (const withSimd of [true, false]) {
  const load = () => {
    const { buffer } = Uint8Array.from(readFileSync(`${model}model.safetensors`));
    tokenizer = new Tokenizer(JSON.parse(readFileSync(`${model}config.json`)), buffer, { withSimd });
  };
  const name = withSimd ? "the page's kernels" : "without WebAssembly's SIMD";
  await measure(
    name,
    load,
    () => tokenizer.encode(new Uint8Array(3072)),
    (length) => tokenizer.decode(tokens.slice(0, length)),
  );
}

const folder = process.argv[2] && resolve(process.argv[2]);
if (folder) {
  const dist = `${folder}/node_modules/onnxruntime-web/dist/`,
    { InferenceSession, Tensor, env } = await import(`${dist}ort.wasm.min.mjs`);
  Object.assign(env.wasm, {
    numThreads: 1,
    wasmPaths: dist,
    wasmBinary: readFileSync(`${dist}ort-wasm-simd-threaded.wasm`),
  });
  const sessions = {},
    pixels = new Tensor("float32", new Float32Array(3072), [1, 3, 32, 32]);
  const given = new Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, 32]);
  const load = async () => {
    for (const half of ["encoder", "decoder"])
      sessions[half] = await InferenceSession.create(Uint8Array.from(readFileSync(`${folder}/onnx/${half}_fp16.onnx`)));
  };
  await measure(
    "onnxruntime-web",
    load,
    () => sessions.encoder.run({ pixels }),
    (length) => sessions.decoder.run({ tokens: given, length: new Tensor("int64", [BigInt(length)], [1]) }),
  );
}
