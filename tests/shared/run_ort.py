"""The outputs of artifacts in an ONNX Runtime of any version: `python run_ort.py ARTIFACT...` prints it as JSON.

Needs numpy and onnxruntime only, so that it runs in an environment that holds nothing else.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

PROMPTS = ([5, 77, 12, 90, 33, 8, 101], [64, 3, 19], [118])
"""Of different lengths, so that the batch is padded."""
STEPS = 4
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def decode(artifact: Path) -> list[list[float]]:
    """Logits of each row's last token, after the padded prompts and after each greedy step: a list for each."""
    manifest = json.loads((artifact / "dispc.json").read_text())
    left, options = manifest["padding"] == "left", ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(str(artifact / "model.onnx"), options, providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    caches = {}  # without a position, and without memory: not every version takes such
    for name, value in inputs.items():
        if name.startswith("past_key_values."):
            shape = (len(PROMPTS), value.shape[1], 0, value.shape[3])
            caches[name] = ort.OrtValue.ortvalue_from_shape_and_type(shape, DTYPES[value.type])
    width, lengths = max(map(len, PROMPTS)), np.array([len(prompt) for prompt in PROMPTS])
    ids, mask = np.zeros((2, len(PROMPTS), width), dtype=np.int64)
    for row, prompt in enumerate(PROMPTS):
        where = slice(width - len(prompt), None) if left else slice(len(prompt))
        ids[row, where], mask[row, where] = prompt, 1
    positions, last, found = np.maximum(mask.cumsum(axis=1) - 1, 0), lengths - 1, []
    for _ in range(1 + STEPS):
        arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        results = session.run_with_ort_values(None, {n: v for n, v in (feeds | caches).items() if n in inputs})
        named = dict(zip([value.name for value in session.get_outputs()], results, strict=True))
        logits = named.pop("logits").numpy().astype(np.float32)
        at = np.minimum(-1 if left else last, logits.shape[1] - 1)
        rows = logits[np.arange(len(PROMPTS)), at]
        found.append(rows.ravel().tolist())
        caches = {name.replace("present.", "past_key_values."): value for name, value in named.items()}
        ids, positions, last = rows.argmax(axis=1)[:, None], lengths[:, None], np.zeros_like(lengths)
        lengths = lengths + 1
        total = mask.shape[1] + 1
        if left:
            mask = np.concatenate([mask, np.ones((len(PROMPTS), 1), dtype=np.int64)], axis=1)
        else:
            mask = (np.arange(total)[None] < lengths[:, None]).astype(np.int64)
    return found


def attempt(artifact: Path) -> dict[str, Any]:
    """`logits`, or the first line of the `error`."""
    try:
        return {"logits": decode(artifact)}
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        return {"error": str(error).splitlines()[0]}


if __name__ == "__main__":
    found = {path: attempt(Path(path)) for path in sys.argv[1:]}
    print(json.dumps({"onnxruntime": ort.__version__, "artifacts": found}))
