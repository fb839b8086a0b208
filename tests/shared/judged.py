"""What the tests of perplexity and zero-shot tasks judge."""

from pathlib import Path

import harness
import language
import tiny

from dispc.compiler import CompileOptions, compile_model
from dispc.masks import Masks


def furnish(folder: Path) -> Path:
    """`model`, `masks.safetensors`, `out` compiled from both, and `text.txt`, in `folder`."""
    model = tiny.make_model("llama", folder / "model")
    language.make_tokenizer(model)
    config = harness.checkpoint("llama").config
    Masks.random(config, 0.4, 1).save(folder / "masks.safetensors", config)
    options = CompileOptions(
        model=model, masks=folder / "masks.safetensors", output=folder / "out", target="onnx-cpu", validate=False
    )
    compile_model(options)
    (folder / "text.txt").write_text(language.make_text(200, 4))
    return folder
