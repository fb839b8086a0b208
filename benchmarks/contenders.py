"""What cpu_decode.py and prefill.py compare: one model dense and half pruned, by dispc, by onnxruntime-genai's builder
and by PyTorch; made, loaded and checked against each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from algorithm1 import Algorithm1
from common import GIB, BenchmarkError, compile_artifact, console, make_masks, remove, run
from decoder import Decoder
from machine import environment
from make_checkpoint import make_checkpoint, write_tokenizer
from shapes import SHAPES

from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.published import open_checkpoint
from dispc.plan import TARGETS
from dispc.quantisation import make_quantisation
from dispc.runtime.memory import available_memory
from dispc.validate.checks.parity import LIMITS, logit_error

TARGET = "onnx-cpu"
DENSE, PRUNED, BUILDER, PYTORCH = "dispc, dense", "dispc, pruned", "builder, dense", "PyTorch, pruned"
BUILDER_PACKAGES = ("onnxruntime-genai", "transformers", "torch", "onnx-ir")
INT4_LIMIT = 0.1
"""Of the logits' range, for the same 4-bit weights: activations are rounded to 8 bits on the way."""
AS_THE_BUILDER: dict[str, Any] = dict(
    block_size=None, asymmetric=False, head=True, embedding=True, int8_activations=True
)
"""What the builder does for int4 on a CPU, besides symmetric blocks of 32, which are both sides' default."""
CHECKED_TOKENS = 16

ModelOption = Annotated[Path | None, typer.Option(help="Hugging Face directory of a LLaMA model.")]
ShapeOption = Annotated[str | None, typer.Option(help="Make a model of random weights instead: tiny, 7b-4.")]
MasksOption = Annotated[Path | None, typer.Option(help="Mask file [random, half of the block parameters].")]
BuilderOption = Annotated[Path | None, typer.Option(help="Python that has the builder.")]
LoweringOption = Annotated[str | None, typer.Option(help="Lowering of the pruned graph [the default of onnx-cpu].")]


@dataclass(frozen=True, kw_only=True)
class Contenders:
    """The loaded models by name, and by how much those differ that should compute the same."""

    checkpoint: Checkpoint
    masks: Masks
    models: Mapping[str, Decoder | Algorithm1]
    differences: Mapping[str, float]
    ballast: Decoder
    """Never run: what is loaded first was seen to be 2 to 4 % slower, whichever model it was."""

    @property
    def dense(self) -> list[str]:
        return [name for name in (DENSE, BUILDER) if name in self.models]


def begin(
    benchmark: str, *, model: Path | None, shape: str | None, masks: Path | None, lowering: str | None,
    builder_python: Path | None, threads: int, rounds: int, calls: int, work: Path, smoke: bool,
    quantize: str | None = None, last_logits: bool = False,
) -> tuple[dict[str, Any], Contenders]:  # fmt: skip
    """What a benchmark is about to measure, and what its result says about that; warns of changes not committed.

    Raises:
        BenchmarkError, typer.BadParameter: as `prepare` and `find_model` do.
    """
    if smoke:
        shape = None if model else "tiny"
    work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "benchmark": benchmark, "quantize": quantize, "lowering": lowering or TARGETS[TARGET].lowering,
        "threads": threads, "rounds": rounds, "calls": calls, "smoke": smoke, "environment": environment(),
        "builder_packages": builder_packages(builder_python),
    }  # fmt: skip
    if changed := result["environment"]["dispc_changed_files"]:
        console.print(f"WARNING: {changed} files of dispc differ from the revision that the result will name")
    source = find_model(model, shape, work)
    contenders = prepare(
        source, masks, work, threads=threads, builder_python=builder_python, quantize=quantize, lowering=lowering,
        last_logits=last_logits,
    )  # fmt: skip
    config = contenders.checkpoint.config
    kept = contenders.masks.kept_parameters(config) / (config.block_parameters * config.num_hidden_layers)
    result |= {"model": shape or source.name, "masks": masks.name if masks else "random", "kept": round(kept, 4)}
    return result | {"logit_differences": contenders.differences}, contenders


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
    model: Path, masks: Path | None, work: Path, *, threads: int, builder_python: Path | None,
    quantize: str | None = None, lowering: str | None = None, last_logits: bool = False,
) -> Contenders:  # fmt: skip
    """Make, load and check everything; what was made stays in `work`.

    Raises:
        BenchmarkError: when memory is short, or two models that should compute the same do not.
    """
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model)
    if masks is None:
        masks = work / "masks.safetensors"
        make_masks(model, masks)
    loaded = Masks.load(masks)
    loaded.check(checkpoint.config, masks)
    graphs = make_graphs(model, masks, work, builder_python, quantize, lowering, last_logits)
    require_memory(graphs)
    ballast = Decoder(graphs[PRUNED], checkpoint.config, threads=threads)
    models: dict[str, Decoder | Algorithm1] = {
        name: Decoder(path, checkpoint.config, threads=threads) for name, path in graphs.items()
    }
    if quantize is None:
        models[PYTORCH] = Algorithm1(checkpoint, loaded, torch.float32, "cpu", last_logits=last_logits)
    differences = {}
    for first, second in ((BUILDER, DENSE), (PRUNED, PYTORCH)):
        if {first, second} <= {*models}:
            found = difference(models[first], models[second], checkpoint.config.vocab_size)
            differences[f"{first} / {second}"] = found
            if not found <= (INT4_LIMIT if quantize else LIMITS["float32"]):
                raise BenchmarkError(f"{first} and {second}: logits differ by {found:.1e} of their range")
    return Contenders(checkpoint=checkpoint, masks=loaded, models=models, differences=differences, ballast=ballast)


def make_graphs(
    model: Path, masks: Path, work: Path, builder_python: Path | None, quantize: str | None, lowering: str | None,
    last_logits: bool,
) -> dict[str, Path]:  # fmt: skip
    """The model.onnx of every contender; `lowering` is the pruned one's, the dense one reads and writes everything."""
    graphs = {name: work / name.replace(", ", "-") / "model.onnx" for name in (DENSE, PRUNED)}
    quantisation = make_quantisation(quantize, TARGET, **AS_THE_BUILDER) if quantize else None
    both = {"quantisation": quantisation, "last_logits": last_logits}
    compile_artifact(model, graphs[DENSE].parent, TARGET, None, **both)
    compile_artifact(model, graphs[PRUNED].parent, TARGET, masks, lowering=lowering, **both)
    if builder_python is not None:
        graphs[BUILDER] = work / "builder" / "model.onnx"
        remove(graphs[BUILDER].parent)
        builder: list[str | Path] = [builder_python, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
        run([*builder, "-p", quantize or "fp32", "-c", work / "cache", "-i", model, "-o", graphs[BUILDER].parent,
             *(("--extra_options", "prune_lm_head=true") if last_logits else ())])  # fmt: skip
    return graphs


def builder_packages(python: Path | None) -> dict[str, str]:
    """Versions of the builder and of what it depends on, where there is one."""
    if python is None:
        return {}
    lines = [f"version({name!r})" for name in BUILDER_PACKAGES]
    output = run([python, "-c", f"from importlib.metadata import version; print({', '.join(lines)})"]).output
    return dict(zip(BUILDER_PACKAGES, output.split(), strict=True))


def require_memory(graphs: Mapping[str, Path]) -> None:
    """Raise BenchmarkError when the weights of all contenders and of the ballast are more than the free memory."""
    sizes = {
        name: sum(file.stat().st_size for file in path.parent.glob("model.onnx*")) for name, path in graphs.items()
    }
    needed, free = sum(sizes.values()) + 2 * sizes[PRUNED], available_memory()
    if free is not None and needed > free:
        raise BenchmarkError(f"the weights need {needed / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB are free")


def difference(first: Decoder | Algorithm1, second: Decoder | Algorithm1, vocabulary: int) -> float:
    """Largest difference of logits over their range: of a prompt, and of a token behind it.

    The two are only compared when they hold the same weights: rounding those to 4 bits moves a small model's logits
    by a third of their range.
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
