"""The stage "right" of gpu_minutes.py: tiny artifacts of every family, judged by `dispc validate`'s checks on the GPU.

    .venv/bin/python benchmarks/gpu_right.py prepare DIR            # on any machine, one process per core
    .venv/bin/python benchmarks/gpu_right.py judge DIR 0 1          # worker 0 of 1: a line of JSON per artifact

Models are those of the tests (tests/shared/tiny.py), with random masks of uneven widths. The most important artifacts
come first, in case a run is cut off.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from machine import REPOSITORY

FAMILIES = ("llama", "opt", "phi", "mistral-window", "qwen3", "qwen2-mixed-window", "llama-tied-biased")
PRIMARY = FAMILIES[:3]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One artifact to judge: a variant of tiny.py and the options that it is compiled with."""

    variant: str
    dtype: str = "float16"
    lowering: str = "inverse-gather"
    padding: str | None = None
    align: int | None = None
    bits: int | None = None
    norm_scope: str = "full"
    last_logits: bool = False

    @property
    def name(self) -> str:
        parts = [self.variant, self.dtype, self.lowering, self.norm_scope]
        parts += [f"{self.padding} padding"] if self.padding else []
        parts += [f"align {self.align}"] if self.align else []
        parts += [f"int{self.bits}"] if self.bits else []
        return ", ".join(parts + ["last logits"] * self.last_logits)

    @property
    def folder(self) -> str:
        return self.name.replace(", ", "_").replace(" ", "-")


def artifacts() -> list[Artifact]:
    """The artifacts, most important first: every family, then each option on the primary families, then the rest."""
    found = [Artifact(variant=variant) for variant in FAMILIES]
    for variant in PRIMARY:
        found.append(Artifact(variant=variant, bits=4))
        found.append(Artifact(variant=variant, dtype="bfloat16"))
        found.append(Artifact(variant=variant, lowering="canonical", norm_scope="selected"))
        found.append(Artifact(variant=variant, padding="left"))
        found.append(Artifact(variant=variant, align=1))
        found.append(Artifact(variant=variant, dtype="float32"))
        found.append(Artifact(variant=variant, bits=8))
    found.append(Artifact(variant="llama", last_logits=True))
    found.append(Artifact(variant="llama", bits=4, align=1))
    found.append(Artifact(variant="llama", bits=4, dtype="bfloat16"))
    for variant in FAMILIES[3:]:
        found.append(Artifact(variant=variant, dtype="bfloat16"))
        found.append(Artifact(variant=variant, bits=4))
        found.append(Artifact(variant=variant, padding="left"))
    for variant in PRIMARY:
        found.append(Artifact(variant=variant, lowering="scatter-elements"))
        found.append(Artifact(variant=variant, dtype="float32", lowering="canonical"))
        found.append(Artifact(variant=variant, dtype="bfloat16", padding="left"))
        found.append(Artifact(variant=variant, lowering="zero-filled"))
    return found


def make_models(directory: Path) -> None:
    """The tiny models with their masks, one set for each norm scope."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "shared"))
    import tiny

    from dispc.masks import Masks, NormScope
    from dispc.model.checkpoint import Checkpoint

    for variant in sorted({artifact.variant for artifact in artifacts()}):
        model = tiny.make_model(variant, directory / variant)
        config = Checkpoint(model).config
        scopes: tuple[NormScope, ...] = ("full", "selected")
        for scope in scopes:
            masks = Masks.random(config, 0.6, seed=1, norm_scope=scope)
            masks.save(model / f"{scope}.safetensors", config)


def compile_one(directory: Path, artifact: Artifact) -> str:
    """Compile an artifact; the error in one line, empty when there is none."""
    from common import compile_artifact

    from dispc.quantisation import Quantisation
    from dispc.support.errors import first_line

    model = directory / artifact.variant
    quantisation = None
    if artifact.bits:
        quantisation = Quantisation(bits=artifact.bits, block_size=32, symmetric=True, head=True, embedding=False)
    try:
        compile_artifact(
            model,
            directory / artifact.folder,
            "onnx-cuda",
            model / f"{artifact.norm_scope}.safetensors",
            dtype=artifact.dtype,
            lowering=artifact.lowering,
            padding=artifact.padding,
            align=artifact.align,
            last_logits=artifact.last_logits,
            quantisation=quantisation,
        )
    except Exception as error:  # the others are still worth judging
        return f"{artifact.name}: {type(error).__name__}: {first_line(error)}"
    return ""


def prepare(directory: Path, limit: int | None = None) -> list[str]:
    """Make models and artifacts in `directory`, in up to 8 processes; returns the errors."""
    directory.mkdir(parents=True, exist_ok=True)
    make_models(directory)
    workers = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return [problem for problem in pool.map(partial(compile_one, directory), artifacts()[:limit]) if problem]


def judge(directory: Path, number: int, workers: int, device: str) -> Iterator[dict[str, Any]]:
    """Judge the artifacts of this worker, apart from those that an earlier process of it has begun."""
    from dispc.support.errors import first_line
    from dispc.validate import CheckOptions, check

    for artifact in artifacts()[number::workers]:
        path, begun = directory / artifact.folder, directory / f"{artifact.folder}.begun"
        if not path.is_dir() or begun.exists():
            continue
        begun.touch()
        started = time.perf_counter()
        try:
            report = check(path, directory / artifact.variant, CheckOptions(device=device))  # type: ignore[arg-type]
            failed = [f"{check.name}: {check.detail}" for check in report.checks if not check.passed]
            figures = [check.figure for check in report.checks if check.group == "parity" and check.figure is not None]
            found = {"passed": report.passed, "failed": failed, "worst": max(figures, default=None)}
            found |= {"checks": len(report.checks), "judged_on": report.judged_on}
        except Exception as error:  # whatever the runtime raises: it is recorded, and the others go on
            found = {"passed": False, "failed": [f"{type(error).__name__}: {first_line(error)}"]}
        yield {"artifact": artifact.name} | found | {"seconds": round(time.perf_counter() - started, 2)}


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        for problem in prepare(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None):
            print(problem, file=sys.stderr)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "2")  # the workers share the cores
        for line in judge(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]):
            print(json.dumps(line), flush=True)
