"""The 7B-shaped checkpoint and its artifacts for gpu_minutes.py, made in the background while the GPU is busy.

    .venv/bin/python benchmarks/gpu_prepare.py PLAN

PLAN is the JSON of a `Preparation`. Prints a line of JSON for each artifact: its seconds, or the error. An artifact's
folder appears when it is complete.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from shutil import disk_usage
from typing import Any

from common import compile_artifact
from learned_like import learned_like
from make_checkpoint import make_checkpoint

from dispc.model.checkpoint import Checkpoint
from dispc.quantisation import Quantisation
from dispc.support.errors import first_line

PRUNED = 0.5


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One artifact of the shape: dense or half pruned, and how it is compiled. `align` None is the target's default."""

    name: str
    pruned: bool = True
    lowering: str | None = None
    align: int | None = None
    bits: int | None = None


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(name="dense", pruned=False),
        Variant(name="inverse-gather", lowering="inverse-gather"),
        Variant(name="inverse-gather, align 1", lowering="inverse-gather", align=1),
        Variant(name="canonical", lowering="canonical"),
        Variant(name="int4 dense", pruned=False, bits=4),
        Variant(name="int4", bits=4),
        Variant(name="int4, align 64", bits=4, align=64),
        Variant(name="inverse-gather, align 64", lowering="inverse-gather", align=64),
        Variant(name="int4, align 1", bits=4, align=1),
    )
}


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to make, and the folders that may hold it: each artifact goes to the folder with most free space."""

    shape: str
    target: str
    folders: tuple[str, ...]
    variants: tuple[str, ...]
    workers: int

    @property
    def model(self) -> Path:
        return Path(self.folders[0]) / self.shape

    @property
    def masks(self) -> Path:
        return Path(self.folders[0]) / f"{self.shape}.safetensors"

    def find(self, name: str) -> Path | None:
        """The finished artifact, or None."""
        return next((path for path in self._places(name) if (path / "dispc.json").is_file()), None)

    def place(self, name: str) -> Path:
        return max(self._places(name), key=lambda path: disk_usage(path.parent).free)

    def _places(self, name: str) -> list[Path]:
        return [Path(folder) / name.replace(", ", "-").replace(" ", "-") for folder in self.folders]


def make(plan: Preparation, name: str) -> dict[str, Any]:
    """Compile one artifact; the record has its seconds, or the error."""
    variant, started = VARIANTS[name], time.perf_counter()
    if plan.find(name) is not None:  # of an earlier run
        return {"prepared": name, "seconds": 0.0}
    quantisation = None
    if variant.bits:
        quantisation = Quantisation(bits=variant.bits, block_size=32, symmetric=True, head=True, embedding=False)
    options = {"lowering": variant.lowering, "align": variant.align, "quantisation": quantisation}
    try:
        compile_artifact(plan.model, plan.place(name), plan.target, plan.masks if variant.pruned else None, **options)
    except Exception as error:  # the others are still worth having
        return {"prepared": name, "error": f"{type(error).__name__}: {first_line(error)}"}
    return {"prepared": name, "seconds": round(time.perf_counter() - started, 1)}


def main(plan: Preparation) -> None:
    """Make everything, several artifacts at a time, in the order of `variants`."""
    started = time.perf_counter()
    for folder in plan.folders:
        Path(folder).mkdir(parents=True, exist_ok=True)
    if not (plan.model / "config.json").is_file():
        make_checkpoint(plan.model, plan.shape)
    config = Checkpoint(plan.model).config
    learned_like(config, 1 - PRUNED, seed=0).save(plan.masks, config)
    _say({"prepared": "checkpoint and masks", "seconds": round(time.perf_counter() - started, 1)})
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // plan.workers))
    with ProcessPoolExecutor(plan.workers, get_context("spawn")) as pool:
        for done in as_completed(pool.submit(make, plan, name) for name in plan.variants):
            _say(done.result())


def as_argument(plan: Preparation) -> str:
    return json.dumps(asdict(plan))


def from_argument(text: str) -> Preparation:
    raw: dict[str, Any] = json.loads(text)
    sequences: dict[str, Sequence[str]] = {name: tuple(raw[name]) for name in ("folders", "variants")}
    return Preparation(**raw | sequences)


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(from_argument(sys.argv[1]))
