// The page: loads artifact/ in onnxruntime-web (WebAssembly, on the CPU) and continues the prompt greedily.
import * as ort from "onnxruntime-web";
import { generate, loadTokenizer } from "./artifact.mjs";

const form = document.querySelector("form");
const button = form.querySelector("button");
const state = document.querySelector("#state");
const output = document.querySelector("output");

async function read(name) {
  const response = await fetch(`artifact/${name}`);
  if (response.status === 404) return null;
  if (!response.ok) throw new Error(`artifact/${name}: ${response.status} ${response.statusText}`);
  return response.text();
}

async function load() {
  const manifest = JSON.parse(await read("dispc.json"));
  const tokenizer = await loadTokenizer(read);
  const session = await ort.InferenceSession.create("artifact/model.onnx", {
    executionProviders: ["wasm"],
    externalData: [{ path: "model.onnx.data", data: "artifact/model.onnx.data" }],
  });
  return { manifest, tokenizer, session };
}

async function answer({ manifest, tokenizer, session }) {
  const started = performance.now();
  const prompt = tokenizer.encode(form.elements.prompt.value);
  const tokens = [];
  output.textContent = "";
  for await (const token of generate(ort, session, manifest, prompt, form.elements.limit.valueAsNumber)) {
    tokens.push(token);
    output.textContent = tokenizer.decode(tokens);
    state.textContent = `${tokens.length} tokens`;
  }
  state.textContent = `done: ${tokens.length} tokens in ${((performance.now() - started) / 1000).toFixed(1)} s`;
}

/** Run `work` with the button disabled; what goes wrong is shown. */
async function busy(work) {
  button.disabled = true;
  try {
    return await work();
  } catch (error) {
    state.textContent = `failed: ${error.message ?? error}`;
    throw error;
  } finally {
    button.disabled = false;
  }
}

const model = busy(load);
model.then(() => (state.textContent = "ready"));
form.addEventListener("submit", (event) => {
  event.preventDefault();
  busy(async () => answer(await model));
});
