"""Artifacts compiled once, and reports on them."""

import functools
from pathlib import Path
from typing import Any

import faults
import harness

from dispc.compiler import CompileOptions, compile_model
from dispc.manifest import Manifest
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.validate import CheckOptions, Report, check
from dispc.validate.comparison import Comparison


@functools.cache
def artifact(variant: str = "phi", target: str = "onnx-cpu", **options: Any) -> Path:
    checkpoint = harness.checkpoint(variant)
    name = "-".join((variant, target, *(f"{key}-{value}" for key, value in sorted(options.items()))))
    path = harness.scratch() / "artifacts" / name
    if path.is_dir():  # made already, by a call that spells the same options in another way
        return path
    options = {"lowering": "inverse-gather"} | options  # the one that faults are planted into, unless a test says more
    masks = Masks.random(checkpoint.config, 0.5, 4)
    if options.pop("norm_scope", "full") == "selected":
        masks = Masks.random(checkpoint.config, 0.5, 4, norm_scope="selected")
    file = harness.scratch() / f"{name}.safetensors"
    masks.save(file, checkpoint.config)
    compile_model(
        CompileOptions(model=checkpoint.directory, masks=file, output=path, target=target, validate=False, **options)
    )
    return path


def judged(path: Path, variant: str = "phi", **options: Any) -> Report:
    return check(path, harness.checkpoint(variant).directory, CheckOptions(**options))


def loaded(path: Path, variant: str) -> Comparison:
    """What single checks are given, on the CPU."""
    return Comparison(path, harness.checkpoint(variant).directory, CheckOptions(device="cpu"))


def failed(report: Report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def compiled(checkpoint: Checkpoint, masks: Masks, folder: Path, **choices: Any) -> Manifest:
    """Compile under `masks`, which are written into `folder`, for the CPU and into `folder / "out"`."""
    masks.save(folder / "masks.safetensors", checkpoint.config)
    options = CompileOptions(
        model=checkpoint.directory,
        masks=folder / "masks.safetensors",
        output=folder / "out",
        target="onnx-cpu",
        validate=False,
        **choices,
    )
    return compile_model(options)


@functools.cache
def originals() -> tuple[Path, Path, Path]:
    """A Phi artifact, one with a fault, and their model."""
    place = harness.scratch() / "reports"
    place.mkdir()
    checkpoint = harness.checkpoint("phi")
    compiled(checkpoint, Masks.random(checkpoint.config, 0.5, 4), place)
    faults.plant(faults.drop_bias, place / "out", place / "broken")
    return place / "out", place / "broken", checkpoint.directory


@functools.cache
def reports() -> tuple[Report, Report]:
    """Of the good artifact with its drill, and of the broken one."""
    good, broken, model = originals()
    return check(good, model, CheckOptions(drill=True)), check(broken, model)
