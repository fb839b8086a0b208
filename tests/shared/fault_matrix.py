"""Planted faults by the hundred: kinds x artifacts x sub-layers x token indices x rows, each judged by `check`.

`python tests/shared/fault_matrix.py --count 1000` judges the unchanged artifacts, plants so many faults and prints what
became of them; `make faults` calls it. A fault is a function of seed and number: `--seed S --first N --count 1` repeats
it. The exit code is 1 when a fault passed, was not named, or a whole artifact failed.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only wait for each other

import faults
import harness
import numpy as np
import tiny
from artifacts import artifact, failed, judged
from fault_kinds import KINDS, Kind
from fault_places import NotHere, Place

from dispc.quantisation import Quantisation
from dispc.reference.blocks import Blocks
from dispc.reference.truth import Answers, Reading, Text, ask, sources
from dispc.runtime.session import Artifact
from dispc.validate import Report
from dispc.validate.checks.scenarios import SCENARIOS
from dispc.validate.client import Client, Row
from dispc.validate.comparison import Comparison

INT4 = Quantisation(bits=4, block_size=16, symmetric=True, head=False, embedding=False)
INT8 = Quantisation(bits=8, block_size=16, symmetric=False, head=True, embedding=False)
VARIANTS = ("llama", "phi", "opt", "qwen3", "mistral-window", "qwen2-mixed-window", "llama-tied-biased", *tiny.FURTHER)
ARTIFACTS: tuple[dict[str, Any], ...] = (
    {"target": "onnx"},
    {"target": "onnx", "dtype": "float16"},
    {"target": "onnx", "dtype": "bfloat16"},
    {"target": "onnx-cpu"},
    {"target": "onnx-cpu", "padding": "left"},
    {"target": "onnx-cpu", "lowering": "canonical"},
    {"target": "onnx-cpu", "lowering": "scatter-elements"},
    {"target": "onnx-cpu", "norm_scope": "selected"},
    {"target": "onnx-cpu", "quantisation": INT4},
    {"target": "onnx-cpu", "quantisation": INT8, "last_logits": True},
    {"target": "onnx-cuda", "dtype": "float16"},
    {"target": "onnx-cuda", "dtype": "bfloat16", "padding": "left"},
)
Case = tuple[str, dict[str, Any]]
MATRIX: tuple[Case, ...] = tuple((variant, options) for variant in VARIANTS for options in ARTIFACTS)
ATTEMPTS = 400
"""Places that are tried for one fault."""
ROUNDING = 1e-6
"""Share of the logits' range by which they may differ where nothing is wrong."""
FIRST_TOKEN, LAST_TOKEN, ROWS = 71, 158, 9
"""Where faults of a token begin (the context has 160), and rows that a batch has for certain."""


@dataclass(frozen=True)
class Planted:
    """What became of one fault: `found` and named, found and `unnamed`, `missed`, or `harmless` (the same logits)."""

    kind: str
    artifact: str
    place: str
    outcome: str
    detail: str


@contextmanager
def reference_read_once() -> Iterator[None]:
    """The reference's answers to the same texts are kept: a fault in an artifact does not change them."""
    known: dict[Any, tuple[Blocks, dict[Text, list[Reading]]]] = {}

    def answers(self: Comparison, rows: Sequence[Row], *, streams: bool = False) -> Answers:
        key = (
            self.checkpoint.directory,
            self.masks.sha256(),
            self.computes_in,
            self.artifact.widened,
            str(self.manifest.quantisation),
            (self.manifest.target, self.manifest.lowering.name, self.manifest.align),
            self.artifact.dtype,
            self.truth,
            streams,
        )
        asked = sources([row.text for row in rows])
        blocks, readings = known.get(key, (None, {}))
        if new := [text for text in asked if not any(text.begins(other) for other in readings)]:
            integers = self.manifest.quantisation is not None
            fresh = ask(self.blocks(), new, self.truth, self.computes_in, streams=streams, integers=integers)
            blocks = blocks or fresh.blocks
            fixed = {text: read for text, read in fresh.readings.items() if key not in known}
            known.setdefault(key, (blocks, fixed))
            readings = readings | fresh.readings
        assert blocks is not None
        return Answers(blocks, readings, self.computes_in)

    keep = nullcontext
    with (
        patch.object(Comparison, "answers", answers),
        patch("dispc.validate.comparison.freed", keep),
        patch("dispc.validate.checks.drill.freed", keep),
    ):
        yield


def places(seed: int, number: int) -> Iterator[Place]:
    """Places for a fault, one to be tried after the other."""
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng((seed, number, attempt))
        block, part = int(rng.integers(3)), str(rng.choice(["attention", "mlp"]))
        token, row = int(rng.integers(FIRST_TOKEN, LAST_TOKEN + 1)), int(rng.integers(ROWS))
        yield Place(block, part, token, row, rng)


def plant_and_judge(name: str, case: Case, place: Place, folder: Path) -> Planted | None:
    """Plant one fault and judge it; None where the artifact has nothing to spoil there."""
    kind, (variant, options) = KINDS[name], case
    whole = artifact(variant, **options)
    broken = folder / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    try:
        faults.plant(lambda model: kind.plant(model, place), whole, broken)
    except NotHere:
        return None
    native = options["target"] == "onnx" and options.get("dtype") == "float16"  # compiling does not widen those
    report = judged(broken, variant, device="cpu", quick=kind.quick and not native)
    outcome, detail = verdict(kind, place, report)
    if outcome == "missed" and same_function(whole, broken):
        outcome, detail = "harmless", "the same logits in every scenario"
    where = place.name if kind.named is None else f"token {place.token}, row {place.row}"
    title = ", ".join((variant, *map(str, options.values())))
    return Planted(name, title, where, outcome, detail)


def verdict(kind: Kind, place: Place, report: Report) -> tuple[str, str]:
    found = failed(report)
    if not found:
        return "missed", "every check passed"
    if kind.check is not None:
        return ("found" if kind.check in found else "unnamed"), ", ".join(sorted(found))
    named = kind.named or place.name
    verdict = (report.drill.verdict if report.drill else None) or "no verdict"
    return ("found" if f"wrong is {named}" in verdict else "unnamed"), verdict


def same_function(whole: Path, broken: Path) -> bool:
    """Whether two artifacts give the same logits in every scenario but for rounding: the fault has no effect.

    So it is with a bias of keys where nothing rotates: it adds the same to every score of a token.
    """
    outputs = []
    for directory in (whole, broken):
        client = Client(Artifact(directory, exact=True, widened=True), 131)
        rows = [row for scenario in SCENARIOS[:6] for row in scenario.run(client)[0]]
        outputs.append(np.concatenate([row.outputs["logits"].ravel() for row in rows]))
    return bool(np.abs(outputs[0] - outputs[1]).max() <= ROUNDING * np.ptp(outputs[0]))


def judge_whole(case: Case) -> Report:
    variant, options = case
    return judged(artifact(variant, **options), variant, device="cpu")


@cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="dispc-faults-", dir=harness.scratch()))


def run(numbers: range, seed: int, matrix: Sequence[Case] = MATRIX) -> Iterator[Planted]:
    """Plant the faults of those numbers, every kind in turn, where an artifact has something to spoil."""
    for number in numbers:
        name = list(KINDS)[number % len(KINDS)]
        for place in places(seed, number):
            case = matrix[int(place.rng.integers(len(matrix)))]
            if (result := plant_and_judge(name, case, place, folder())) is not None:
                yield result
                break
        else:
            raise AssertionError(f"{name}: nothing to spoil in {ATTEMPTS} places")


def failing(cases: Sequence[Case]) -> int:
    """How many unchanged artifacts fail."""
    failures = 0
    for number, case in enumerate(cases):
        progress(number, len(cases), "whole artifacts")
        report = judge_whole(case)
        if not report.passed:
            failures += 1
            print(f"WHOLE ARTIFACT FAILED: {case}: {sorted(failed(report))}", flush=True)
    return failures


def progress(done: int, total: int, what: str) -> None:
    """A line for every fiftieth."""
    if done and done % 50 == 0:
        print(f"{done} of {total} {what}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    with reference_read_once():
        wholes = MATRIX if options.first == 0 else ()
        wrong = failing(wholes)
        print(f"{len(wholes)} whole artifacts, {wrong} failed", flush=True)
        numbers = range(options.first, options.first + options.count)
        for number, result in zip(numbers, run(numbers, options.seed), strict=True):
            progress(number - options.first, options.count, f"faults, {outcomes['found']} found")
            outcomes[result.outcome] += 1
            kinds[result.kind] += 1
            if result.outcome != "found" or options.count == 1:
                said = f"{result.kind}; {result.artifact}; {result.place}: {result.detail}"
                print(f"{number}: {result.outcome.upper()}: {said}", flush=True)
    for name, times in sorted(kinds.items()):
        print(f"{times:5} {name}")
    print(
        f"{outcomes.total()} faults of {len(kinds)} kinds on {len(MATRIX)} artifacts (seed {options.seed}): "
        f"{outcomes['found']} found and named, {outcomes['unnamed']} found and not named, {outcomes['missed']} missed, "
        f"{outcomes['harmless']} without effect (the same logits)"
    )
    return int(bool(wrong or outcomes["missed"] or outcomes["unnamed"]))


if __name__ == "__main__":
    sys.exit(main())
