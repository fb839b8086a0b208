"""Chat with an artifact in onnxruntime-genai. Without a prompt it asks for one, again and again.

python examples/genai_chat.py ARTIFACT ["What is the capital of France?"] --max-new-tokens 64
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import onnxruntime_genai as og


def answer(model: og.Model, tokenizer: og.Tokenizer, text: str, max_new_tokens: int) -> Iterator[str]:
    """Yield the greedy continuation of `text` in pieces, until a stop token or the limit."""
    prompt = tokenizer.encode(text)
    context = json.loads((Path(options.artifact) / "genai_config.json").read_text())["model"]["context_length"]
    if len(prompt) >= context:
        raise SystemExit(f"{len(prompt)} tokens so far, the model takes {context}: start again")
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=min(len(prompt) + max_new_tokens, context))
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    stream = tokenizer.create_stream()
    while not generator.is_done():
        generator.generate_next_token()
        token = generator.get_next_tokens()[0]
        if token not in tokenizer.eos_token_ids:
            yield stream.decode(token)


def ask() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


parser = argparse.ArgumentParser(description="Chat with an artifact in onnxruntime-genai.")
parser.add_argument("artifact")
parser.add_argument("prompt", nargs="?")
parser.add_argument("--max-new-tokens", type=int, default=128)
options = parser.parse_args()

model = og.Model(options.artifact)
tokenizer = og.Tokenizer(model)
chat = (Path(options.artifact) / "chat_template.jinja").exists() or "chat_template" in json.loads(
    (Path(options.artifact) / "tokenizer_config.json").read_text()
)
turns = []
while prompt := options.prompt or ask():
    turns.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(json.dumps(turns), add_generation_prompt=True) if chat else prompt
    reply = ""
    for piece in answer(model, tokenizer, text, options.max_new_tokens):
        print(piece, end="", flush=True)
        reply += piece
    print()
    turns.append({"role": "assistant", "content": reply})
    if options.prompt:
        break
