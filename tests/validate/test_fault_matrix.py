"""A fault of every kind, planted somewhere in an artifact: each is found and named. `make faults` plants a thousand."""

from collections.abc import Iterator

import pytest
import tiny
from artifacts import failed
from fault_kinds import KINDS
from fault_matrix import ARTIFACTS, MATRIX, judge_whole, reference_read_once, run

SOME = tuple(
    (variant, options)
    for variant, options in MATRIX
    if (variant in ("phi", "opt") and "norm_scope" not in options and options.get("dtype") != "bfloat16")
    or variant == "mistral-window"
)[::3] + tuple((variant, ARTIFACTS[number % len(ARTIFACTS)]) for number, variant in enumerate(tiny.FURTHER))
"""Artifacts enough for every kind, among them one of every further family."""


@pytest.fixture(scope="module", autouse=True)
def _reference() -> Iterator[None]:
    with reference_read_once():
        yield


def test_a_fault_of_every_kind_is_found_and_named() -> None:
    results = list(run(range(len(KINDS)), seed=2026, matrix=SOME))
    assert {result.kind for result in results} == set(KINDS)
    wrong = [result for result in results if result.outcome not in ("found", "harmless")]
    assert not wrong, "\n".join(map(str, wrong))
    assert sum(result.outcome == "harmless" for result in results) <= 2  # the rest was really spoiled


@pytest.mark.parametrize("case", [("phi", {"target": "onnx", "dtype": "float16"}), *SOME[::2]], ids=str)
def test_whole_artifacts_pass(case: tuple[str, dict[str, str]]) -> None:
    report = judge_whole(case)
    assert report.passed, failed(report)
