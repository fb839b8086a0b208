"""What cpu_decode.py and prefill.py compare: one model dense and half pruned, by dispc, by onnxruntime-genai's builder
and by PyTorch; made, loaded and checked against each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from algorithm1 import Algorithm1
from common import BenchmarkError, compile_artifact, make_masks, remove, run
from decoder import Decoder
from make_checkpoint import make_checkpoint, write_tokenizer
from shapes import SHAPES

from dispc.checkpoint import Checkpoint
from dispc.compiler import CompileOptions
from dispc.masks import Masks
from dispc.validate.parity import LIMITS, logit_error

DENSE, PRUNED, BUILDER, PYTORCH = "dispc, dense", "dispc, pruned", "builder, dense", "PyTorch, pruned"
INT4_LIMIT = 0.25
"""Two ways to round weights to 4 bits differ by far more than two ways to add up: this only tells nonsense."""
CHECKED_TOKENS = 16

ModelOption = Annotated[Path | None, typer.Option(help="Hugging Face directory of a LLaMA model.")]
ShapeOption = Annotated[str | None, typer.Option(help="Make a model of random weights instead: tiny, 7b-4.")]
MasksOption = Annotated[Path | None, typer.Option(help="Mask file [random, half of the block parameters].")]
BuilderOption = Annotated[Path | None, typer.Option(help="Python that has the builder.")]


@dataclass(frozen=True, kw_only=True)
class Contenders:
    """The loaded models by name; `missing` says which there are not, and why."""

    checkpoint: Checkpoint
    masks: Masks
    models: Mapping[str, Decoder | Algorithm1]
    missing: Mapping[str, str]
    differences: Mapping[str, float]

    @property
    def dense(self) -> list[str]:
        return [name for name in (DENSE, BUILDER) if name in self.models]


def find_model(model: Path | None, shape: str | None, work: Path) -> Path:
    """The model directory to measure, made of random weights when only a shape is given.

    Raises:
        typer.BadParameter: when neither or both are given, or the shape is unknown.
    """
    if (model is None) == (shape is None):
        raise typer.BadParameter("give --model or --shape")
    if model is not None:
        return model
    if shape not in SHAPES:
        raise typer.BadParameter(f"unknown shape {shape}; shapes are {', '.join(SHAPES)}")
    directory = work / "model"
    make_checkpoint(directory, shape)
    write_tokenizer(directory)
    return directory


def prepare(
    model: Path,
    masks: Path | None,
    work: Path,
    *,
    threads: int,
    builder_python: Path | None,
    quantize: str | None = None,
) -> Contenders:
    """Make, load and check everything; what was made stays in `work`.

    Raises:
        BenchmarkError: when two models that should compute the same do not.
    """
    torch.set_num_threads(threads)
    checkpoint = Checkpoint(model)
    if masks is None:
        masks = work / "masks.safetensors"
        make_masks(model, masks)
    loaded = Masks.load(masks)
    loaded.check(checkpoint.config, masks)
    models: dict[str, Decoder | Algorithm1] = {}
    missing: dict[str, str] = {}
    options = {} if quantize is None else {"quantize": quantize}
    for name, path in ((DENSE, None), (PRUNED, masks)):
        output = work / name.replace(", ", "-")
        if not {*options} <= CompileOptions.__dataclass_fields__.keys():
            missing[name] = "not available: this dispc compile has no --quantize"
            continue
        compile_artifact(model, output, "onnx-cpu", path, **options)
        models[name] = Decoder(output / "model.onnx", checkpoint.config, threads=threads)
    if builder_python is not None:
        output = work / "builder"
        remove(output)
        precision = quantize or "fp32"
        command: list[str | Path] = [builder_python, "-m", "onnxruntime_genai.models.builder", "-p", precision]
        run([*command, "-e", "cpu", "-c", work / "cache", "-i", model, "-o", output])
        models[BUILDER] = Decoder(output / "model.onnx", checkpoint.config, threads=threads)
    if quantize is None:
        models[PYTORCH] = Algorithm1(checkpoint, loaded, torch.float32, "cpu")
    limit = INT4_LIMIT if quantize else LIMITS["float32"]
    pairs = [(first, second) for first, second in ((BUILDER, DENSE), (PRUNED, PYTORCH)) if {first, second} <= {*models}]
    differences = {f"{a} / {b}": difference(models[a], models[b], checkpoint.config.vocab_size) for a, b in pairs}
    for pair, found in differences.items():
        if not found <= limit:
            raise BenchmarkError(f"{pair}: logits differ by {found:.1e} of their range, {limit:.0e} is allowed")
    return Contenders(checkpoint=checkpoint, masks=loaded, models=models, missing=missing, differences=differences)


def difference(first: Decoder | Algorithm1, second: Decoder | Algorithm1, vocabulary: int) -> float:
    """Largest difference of logits over their range: of a prompt, and of a token behind it."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, CHECKED_TOKENS + 1))
    found = []
    for model in (first, second):
        model.allocate(1, CHECKED_TOKENS + 1)
        rows = []
        for part, past in ((ids[:, :-1], 0), (ids[:, -1:], CHECKED_TOKENS)):
            step = model.bind(part, past)
            step.run()
            rows.append(step.logits())
        found.append(np.concatenate(rows, axis=1))
    return logit_error(found[0], found[1])
