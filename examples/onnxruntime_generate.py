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
    """Yield the likeliest token behind `prompt` again and again, until a stop token, the limit or the context's end.

    Where the artifact allows it, past and present of a cache are one buffer, into which ONNX Runtime writes in place.
    Elsewhere each run makes the next, longer cache.
    """
    config = json.loads((artifact / "genai_config.json").read_text())
    model, shared = config["model"], config["search"]["past_present_share_buffer"]
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    session = ort.InferenceSession(artifact / "model.onnx", providers=[provider])
    capacity = min(len(prompt) + max_new_tokens, model["context_length"])
    names = [value.name for value in session.get_outputs()]
    caches = {
        value.name: ort.OrtValue.ortvalue_from_shape_and_type(
            (1, value.shape[1], capacity if shared else 0, value.shape[3]), DTYPES[value.type], device
        )
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    binding, tokens, length = session.io_binding(), prompt, 0
    while length + len(tokens) < capacity:
        positions = np.arange(length, length + len(tokens))[None]
        length += len(tokens)
        binding.bind_cpu_input("input_ids", np.array([tokens]))
        binding.bind_cpu_input("attention_mask", np.ones((1, length), dtype=np.int64))
        if "position_ids" in {value.name for value in session.get_inputs()}:
            binding.bind_cpu_input("position_ids", positions)
        for name in names:
            past = name.replace("present.", "past_key_values.")
            if past in caches:
                binding.bind_ortvalue_input(past, caches[past])
            if past in caches and shared:
                binding.bind_ortvalue_output(name, caches[past])
            else:
                binding.bind_output(name, "cpu" if name == "logits" else device)
        session.run_with_iobinding(binding)
        outputs = dict(zip(names, binding.get_outputs(), strict=True))
        token = int(outputs.pop("logits").numpy()[0, -1].argmax())
        if token in model["eos_token_id"]:
            return
        yield token
        caches = {name.replace("present.", "past_key_values."): value for name, value in outputs.items()}
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
