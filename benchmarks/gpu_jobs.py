"""Jobs for gpu_cells.py, and the parent process that runs them."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from children import Record, read_records

SCRIPT = Path(__file__).with_name("gpu_cells.py")
EAGER, GRAPHED, COMPILED = "PyTorch", "PyTorch, CUDA graph", "PyTorch compiled"
ORT, CUDA_GRAPH = "ORT", "ORT, CUDA graph"
DECODE_ONLY = (GRAPHED, COMPILED, CUDA_GRAPH)
"""Runtimes that only save kernel launches, which hardly matter in a prefill."""
PYTORCH = {"cuda": (EAGER, GRAPHED, COMPILED), "cpu": (EAGER, COMPILED)}
ONNX_RUNTIME = {"cuda": (ORT, CUDA_GRAPH), "cpu": (ORT,)}
"""Device -> the runtimes of PyTorch and of ONNX Runtime there."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to time: `decode`, a step with `tokens` in the caches, or `prefill` of `tokens`."""

    phase: str
    batch: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model and how to run it: in PyTorch without an artifact, dense without masks.

    `reference` is the file of eager PyTorch's logits; None skips the comparison (quantised weights have other logits).
    `turns` is a file that is locked while timing, for jobs that run at the same time.
    """

    model: str
    masks: str | None
    artifact: str | None
    reference: str | None
    runtimes: tuple[str, ...]
    device: str
    dtype: str
    cells: tuple[Cell, ...]
    rounds: int
    calls: int
    turns: str | None = None

    def planned(self) -> list[tuple[str, Cell]]:
        """Every (runtime, cell), in order."""
        return [(r, c) for r in self.runtimes for c in self.cells if r not in DECODE_ONLY or c.phase == "decode"]

    def planned_records(self) -> list[Record]:
        """The start of each planned cell's record, which says what was measured."""
        return [{"runtime": runtime} | asdict(cell) for runtime, cell in self.planned()]

    @staticmethod
    def from_json(text: str) -> "Job":
        raw = json.loads(text)
        return Job(**raw | {"cells": tuple(Cell(**cell) for cell in raw["cells"]), "runtimes": tuple(raw["runtimes"])})


def run_jobs(jobs: Sequence[Job], seconds: float, work: Path, record: Callable[[int, Record], None]) -> int:
    """Run jobs of gpu_cells.py in one process; `record` is called with the number of the job and each record of it.

    Cells of the last job that began are recorded as errors when the process did not print them. Returns the number of
    that job: after it, nothing has been measured.
    """
    measured: list[list[Record]] = [[] for _ in jobs]
    begun = 0

    def note(found: Record) -> None:
        nonlocal begun
        begun = max(begun, found.pop("job", begun))
        measured[begun].append(found)
        record(begun, found)

    command = [sys.executable, str(SCRIPT), *(json.dumps(asdict(job)) for job in jobs)]
    error = read_records(command, seconds, work, note)
    for cell in jobs[begun].planned_records():
        if not any(cell.items() <= found.items() for found in measured[begun]):
            record(begun, cell | {"error": error or "not measured"})
    return begun
