// Runs page_jobs.mjs in node: jobs as JSON in, their results as JSON out.

import { readFileSync } from "node:fs";

import { run } from "./page_jobs.mjs";

function load(path) {
  const file = readFileSync(new URL(`../${path}`, import.meta.url));
  return file.buffer.slice(file.byteOffset, file.byteOffset + file.length);
}

process.stdout.write(JSON.stringify(await run(JSON.parse(readFileSync(0)), load)));
