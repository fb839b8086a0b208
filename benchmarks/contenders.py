"""One model, dense and half pruned, in dispc's, onnxruntime-genai's and PyTorch's way: compiled, loaded, and checked
against each other before anything is timed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from algorithm1 import Algorithm1
from common import GIB, BenchmarkError, compile_artifact, make_masks, remove, run
from decoder import Decoder
from make_checkpoint import make_checkpoint, write_tokenizer
from shapes import SHAPES

from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.published import open_checkpoint
from dispc.quantisation import make_quantisation
from dispc.runtime.memory import available_memory
from dispc.validate.checks.parity import LIMITS, logit_error

TARGET = "onnx-cpu"
DENSE, PRUNED, BUILDER, PYTORCH = "dispc, dense", "dispc, pruned", "builder, dense", "PyTorch, pruned"
BUILDER_PACKAGES = ("onnxruntime-genai", "transformers", "torch", "onnx-ir")
INT4_LIMIT = 0.1
"""Largest difference of logits, of their range, with the same 4-bit weights and 8-bit activations."""
AS_THE_BUILDER: dict[str, Any] = dict(
    block_size=None, asymmetric=False, head=True, embedding=True, int8_activations=True
)
"""What the builder does for int4 on a CPU, apart from symmetric blocks of 32, the default of both."""
CHECKED_TOKENS = 16

Contender = Decoder | Algorithm1


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What to compile and load. `masks` None makes random ones; `builder_python` None leaves the builder out."""

    model: Path
    masks: Path | None
    work: Path
    threads: int
    builder_python: Path | None = None
    quantize: str | None = None
    lowering: str | None = None
    """Of the pruned graph: the dense one reads and writes everything."""
    last_logits: bool = False


@dataclass(frozen=True, kw_only=True)
class Contenders:
    """The loaded models by name, and the differences of logits between those that should compute the same."""

    checkpoint: Checkpoint
    masks: Masks
    models: Mapping[str, Contender]
    differences: Mapping[str, float]
    ballast: Decoder
    """Loaded first and never run: the first session of a process was 2 to 4 % slower, whichever model it held."""

    @property
    def dense(self) -> list[str]:
        return [name for name in (DENSE, BUILDER) if name in self.models]


def find_model(model: Path | None, shape: str | None, work: Path) -> Path:
    """The model directory to measure; random weights when a shape is given.

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


def prepare(setup: Setup) -> Contenders:
    """Make, load and check everything; what was made stays in `setup.work`.

    Raises:
        BenchmarkError: when memory is short, or two models that should compute the same do not.
    """
    torch.set_num_threads(setup.threads)
    checkpoint = open_checkpoint(setup.model)
    file = setup.masks
    if file is None:
        file = setup.work / "masks.safetensors"
        make_masks(setup.model, file)
    masks = Masks.load(file)
    masks.check(checkpoint.config, file)
    graphs = make_graphs(setup, file)
    require_memory(graphs)
    ballast = Decoder(graphs[PRUNED], checkpoint.config, threads=setup.threads)
    models: dict[str, Contender] = {
        name: Decoder(path, checkpoint.config, threads=setup.threads) for name, path in graphs.items()
    }
    if setup.quantize is None:
        models[PYTORCH] = Algorithm1(checkpoint, masks, torch.float32, "cpu", last_logits=setup.last_logits)
    differences = {}
    for first, second in ((BUILDER, DENSE), (PRUNED, PYTORCH)):
        if {first, second} <= {*models}:
            found = difference(models[first], models[second], checkpoint.config.vocab_size)
            differences[f"{first} / {second}"] = found
            if not found <= (INT4_LIMIT if setup.quantize else LIMITS["float32"]):
                raise BenchmarkError(f"{first} and {second}: logits differ by {found:.1e} of their range")
    return Contenders(checkpoint=checkpoint, masks=masks, models=models, differences=differences, ballast=ballast)


def make_graphs(setup: Setup, masks: Path) -> dict[str, Path]:
    """Compile every contender but PyTorch's; name -> its model.onnx."""
    work, quantize = setup.work, setup.quantize
    graphs = {name: work / name.replace(", ", "-") / "model.onnx" for name in (DENSE, PRUNED)}
    quantisation = make_quantisation(quantize, TARGET, **AS_THE_BUILDER) if quantize else None
    both = {"quantisation": quantisation, "last_logits": setup.last_logits}
    compile_artifact(setup.model, graphs[DENSE].parent, TARGET, None, **both)
    compile_artifact(setup.model, graphs[PRUNED].parent, TARGET, masks, lowering=setup.lowering, **both)
    if setup.builder_python is not None:
        graphs[BUILDER] = work / "builder" / "model.onnx"
        remove(graphs[BUILDER].parent)
        builder: list[str | Path] = [setup.builder_python, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
        builder += ["-p", quantize or "fp32", "-c", work / "cache", "-i", setup.model, "-o", graphs[BUILDER].parent]
        builder += ["--extra_options", "prune_lm_head=true"] if setup.last_logits else []
        run(builder)
    return graphs


def builder_packages(python: Path | None) -> dict[str, str]:
    """Versions of the builder and its dependencies; empty without a builder."""
    if python is None:
        return {}
    lines = [f"version({name!r})" for name in BUILDER_PACKAGES]
    output = run([python, "-c", f"from importlib.metadata import version; print({', '.join(lines)})"]).output
    return dict(zip(BUILDER_PACKAGES, output.split(), strict=True))


def require_memory(graphs: Mapping[str, Path]) -> None:
    """Raise BenchmarkError when the weights of all contenders and the ballast do not fit into free memory."""
    sizes = {
        name: sum(file.stat().st_size for file in path.parent.glob("model.onnx*")) for name, path in graphs.items()
    }
    needed, free = sum(sizes.values()) + 2 * sizes[PRUNED], available_memory()
    if free is not None and needed > free:
        raise BenchmarkError(f"the weights need {needed / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB are free")


def difference(first: Contender, second: Contender, vocabulary: int) -> float:
    """Largest difference of logits over their range: of a prompt, and of a token after it.

    Compare only models with the same weights: rounding them to 4 bits moves the logits of a small model by a third of
    their range.
    """
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
