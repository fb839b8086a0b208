"""The outputs of artifacts in an onnxruntime-genai of any version: `python run_genai.py ARTIFACT...` prints JSON."""

import json
import sys
from typing import Any

import onnxruntime_genai as og
from run_ort import PROMPTS, STEPS


def decode(artifact: str) -> list[list[int]]:
    """The greedy tokens after each prompt, fed by itself."""
    model, found = og.Model(artifact), []
    for prompt in PROMPTS:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(prompt) + 1 + STEPS)
        generator = og.Generator(model, parameters)
        generator.append_tokens(prompt)
        tokens = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        found.append(tokens)
    return found


def attempt(artifact: str) -> dict[str, Any]:
    """`tokens`, or the first line of the `error`."""
    try:
        return {"tokens": decode(artifact)}
    except Exception as error:  # nor do its exceptions
        return {"error": f"{type(error).__name__} {error}".splitlines()[0]}


if __name__ == "__main__":
    print(json.dumps({"artifacts": {path: attempt(path) for path in sys.argv[1:]}}))
