// Greedy text from an artifact in Node.js:  node generate.mjs ARTIFACT PROMPT [--max-new-tokens N]
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { parseArgs } from "node:util";
import * as ort from "onnxruntime-node";
import { generate, loadTokenizer } from "./artifact.mjs";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { "max-new-tokens": { type: "string", default: "128" } },
});
const [directory, prompt] = positionals;
if (prompt === undefined) {
  console.error("usage: node generate.mjs ARTIFACT PROMPT [--max-new-tokens N]");
  process.exit(2);
}
const read = async (name) => (existsSync(join(directory, name)) ? readFile(join(directory, name), "utf8") : null);

const manifest = JSON.parse(await read("dispc.json"));
const tokenizer = await loadTokenizer(read);
const session = await ort.InferenceSession.create(join(directory, "model.onnx"));

const tokens = [];
for await (const token of generate(ort, session, manifest, tokenizer.encode(prompt), Number(values["max-new-tokens"]))) {
  tokens.push(token);
}
console.log(tokenizer.decode(tokens));
