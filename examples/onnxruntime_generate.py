"""Greedy text from an artifact in plain ONNX Runtime, with the caches bound to the device (IOBinding).

python examples/onnxruntime_generate.py ARTIFACT "What is the capital of France?" --max-new-tokens 64
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
from transformers import AutoTokenizer

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def generate(artifact: Path, prompt: list[int], max_new_tokens: int, device: str = "cpu") -> Iterator[int]:
    """Yield the likeliest token after `prompt` again and again, until a stop token, the limit or the context's end.

    Where the artifact allows it, past and present of a cache are one buffer, into which ONNX Runtime writes in place.
    Elsewhere each run makes the next, longer cache.
    """
    config = json.loads((artifact / "genai_config.json").read_text())
    model, shared = config["model"], config["search"]["past_present_share_buffer"]
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    session = ort.InferenceSession(artifact / "model.onnx", providers=[provider])
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value.name.replace("present.", "past_key_values.") for value in session.get_outputs()}
    capacity = min(len(prompt) + max_new_tokens, model["context_length"])

    def empty_cache(name: str) -> ort.OrtValue:
        _, heads, _, size = inputs[name].shape
        shape = (1, heads, capacity if shared else 0, size)
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, DTYPES[inputs[name].type], device)

    caches = {name: empty_cache(name) for name in inputs if name.startswith("past_key_values.")}
    binding, tokens, length = session.io_binding(), prompt, 0
    while length + len(tokens) < capacity:
        positions = np.arange(length, length + len(tokens))[None]
        length += len(tokens)
        binding.bind_cpu_input("input_ids", np.array([tokens]))
        binding.bind_cpu_input("attention_mask", np.ones((1, length), dtype=np.int64))
        if "position_ids" in inputs:
            binding.bind_cpu_input("position_ids", positions)
        for name, past in outputs.items():
            if past in caches:
                binding.bind_ortvalue_input(past, caches[past])
            if past in caches and shared:
                binding.bind_ortvalue_output(name, caches[past])
            else:
                binding.bind_output(name, "cpu" if name == "logits" else device)
        session.run_with_iobinding(binding)
        results = dict(zip(outputs.values(), binding.get_outputs(), strict=True))
        token = int(results["logits"].numpy()[0, -1].argmax())
        if token in model["eos_token_id"]:
            return
        yield token
        caches = {past: results[past] for past in caches}
        tokens = [token]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Greedy text from an artifact in plain ONNX Runtime.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.artifact)
    text = options.prompt
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template)
    tokens = list(generate(options.artifact, ids, options.max_new_tokens, options.device))
    print(tokenizer.decode(tokens, skip_special_tokens=True))
