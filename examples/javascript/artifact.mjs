// An artifact of dispc in JavaScript. onnxruntime-node and onnxruntime-web offer the same API; it is passed in as `ort`.
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";

const Half = globalThis.Float16Array ?? Uint16Array; // where there are no half floats, their bits
const CACHE_ARRAYS = { float32: Float32Array, float16: Half };

/** Yield greedy tokens after `prompt` (token ids) until a stop token, the limit, or the end of the context. */
export async function* generate(ort, session, manifest, prompt, maxNewTokens) {
  const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const limit = Math.min(maxNewTokens, manifest.positions - prompt.length);
  let caches = emptyCaches(ort, session);
  let tokens = prompt;
  let length = 0;
  for (let step = 0; step < limit; step++) {
    const positions = tokens.map((_, i) => length + i);
    length += tokens.length;
    const feeds = { input_ids: integers(tokens), attention_mask: integers(Array(length).fill(1)), ...caches };
    if (session.inputNames.includes("position_ids")) feeds.position_ids = integers(positions);
    const { logits, ...presents } = await session.run(feeds);
    const token = likeliest(logits.data.subarray(-logits.dims[2])); // logits are [1, sequence, vocabulary]
    if (manifest.stop_tokens.includes(token)) return;
    yield token;
    caches = Object.fromEntries(
      Object.entries(presents).map(([name, value]) => [name.replace("present.", "past_key_values."), value]),
    );
    tokens = [token];
  }
}

function emptyCaches(ort, session) {
  const caches = session.inputMetadata.filter(({ name }) => name.startsWith("past_key_values."));
  return Object.fromEntries(
    caches.map(({ name, type, shape: [, heads, , size] }) => [
      name,
      new ort.Tensor(type, new CACHE_ARRAYS[type](0), [1, heads, 0, size]),
    ]),
  );
}

function likeliest(logits) {
  // Bits of half floats, read as sign and magnitude, have the order of the numbers.
  const value = logits instanceof Uint16Array ? (bits) => (bits < 0x8000 ? bits : 0x8000 - bits) : (number) => number;
  return logits.reduce((best, logit, i) => (value(logit) > value(logits[best]) ? i : best), 0);
}

/** The tokenizer of an artifact: `read(name)` returns the text of one of its files, or null where there is none. */
export async function loadTokenizer(read) {
  const config = JSON.parse(await read("tokenizer_config.json"));
  const template = (await read("chat_template.jinja")) ?? config.chat_template;
  const tokenizer = new Tokenizer(JSON.parse(await read("tokenizer.json")), config);
  const special = (name) => config[name]?.content ?? config[name] ?? "";
  return {
    encode(prompt) {
      if (!template) return tokenizer.encode(prompt).ids;
      const messages = [{ role: "user", content: prompt }];
      const names = { bos_token: special("bos_token"), eos_token: special("eos_token") };
      const text = new Template(template).render({ messages, add_generation_prompt: true, ...names });
      return tokenizer.encode(text, { add_special_tokens: false }).ids;
    },
    decode: (ids) => tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false }),
  };
}
