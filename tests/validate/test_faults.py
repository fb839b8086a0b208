"""Planted faults: every one is found, by the checks that can see it, and named."""

from itertools import count
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
from artifacts import artifact, failed, judged

from dispc.quantisation import Quantisation
from dispc.runtime.session import Artifact
from dispc.validate import Report, Thresholds
from dispc.validate.checks import graph, weights
from dispc.validate.checks.variants import same_bits
from dispc.validate.client import Client

EVERYTHING = {
    "prefill",
    "one token",
    "decode",
    "long prompt",
    "long prompt in pieces",
    "padded batch",
    "shared past and present",
    "greedy logits",
    "KL divergence",
}
FAULTS: dict[str, tuple[faults.Fault, str, str, set[str]]] = {
    "an index swapped": (faults.swap_read_indices, "right", "block 1 mlp (read ", EVERYTHING),
    "a row zeroed": (faults.zero_weight_row, "right", "block 2 attention (read ", EVERYTHING),
    "a wrong inverse index": (faults.shift_inverse_index, "right", "block 0 mlp (read ", EVERYTHING),
    "a missing bias": (faults.drop_bias, "right", "block 1 mlp (read ", EVERYTHING),
    "another block's mask": (faults.read_with_the_mask_of_another_block, "right", "block 1 attention", EVERYTHING),
    "a column of the head": (faults.spoil_the_head, "right", "final norm and head", EVERYTHING),
    "padding attended to": (
        faults.forget_padding,
        "right",
        "block 0 attention",
        {"padded batch", "shared past and present"},
    ),
    "padding attended to, left": (faults.forget_padding, "left", "block 0 attention", {"padded batch"}),
}


def seen_in(report: Report) -> set[str]:
    """The checks that fail for what is computed; whether nodes and weights are those expected is checked beside it."""
    return failed(report) - {graph.NAME, weights.NAME}


@pytest.mark.parametrize("case", FAULTS)
def test_a_planted_fault_fails_the_checks_that_can_see_it_and_is_named(case: str, tmp_path: Path) -> None:
    fault, padding, where, checks = FAULTS[case]
    broken = faults.plant(fault, artifact(padding=padding), tmp_path / "broken")
    report = judged(broken)
    assert (
        checks
        <= seen_in(report)
        <= EVERYTHING | {"greedy tokens", "top-1 tokens", "padding of the other side"} | ({"KL divergence"})
    )
    if checks != EVERYTHING:
        assert not seen_in(report) & (EVERYTHING - checks - {"KL divergence"})
    assert report.drill is not None
    verdict = report.drill.verdict
    assert f"the first to be wrong is {where}" in verdict
    assert "lowering inverse-gather" in verdict or "head" in where
    if where.startswith("block"):
        block, part = int(where.split()[1]), where.split()[2]
        widths = report.widths[block]
        assert f"read {widths[f'{part}.read']}" in verdict and f"write {widths[f'{part}.write']}" in verdict


INT4 = Quantisation(bits=4, block_size=16, symmetric=True, head=False, embedding=False)
KINDS: dict[str, dict[str, Any]] = {
    "bfloat16, left": {"target": "onnx-cuda", "align": 1, "dtype": "bfloat16", "padding": "left"},
    "scatter-elements": {"lowering": "scatter-elements"},
    "float16, canonical": {"target": "onnx-cuda", "align": 1, "dtype": "float16", "lowering": "canonical"},
    "float16, int4": {"target": "onnx-cuda", "align": 1, "dtype": "float16", "quantisation": INT4},
}
SUBTLE = {
    "block 1 mlp": faults.drop_bias,
    "block 1 mlp (": faults.swap_read_indices,
    "final norm and head": faults.spoil_the_head,
    "block 2 attention": faults.zero_weight_row,
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_artifact_hides_a_fault(kind: str, tmp_path: Path) -> None:
    whole = artifact(**KINDS[kind])
    assert judged(whole, device="cpu", quick=True).passed
    quantised = "quantisation" in KINDS[kind]
    found = SUBTLE | {"block 1 mlp (read": faults.zero_a_scale} if quantised else SUBTLE
    for number, (where, fault) in enumerate(found.items()):
        if quantised and fault is faults.zero_weight_row:
            continue  # there are no rows of floats
        report = judged(faults.plant(fault, whole, tmp_path / str(number)), device="cpu", quick=True)
        assert not report.passed, where
        assert report.drill is not None and f"the first to be wrong is {where}" in report.drill.verdict, where


@pytest.mark.parametrize(
    ("fault", "seeing"),
    [
        (faults.spoil_late_positions, {"long prompt", "long prompt in pieces", "rotary tables"}),
        (faults.spoil_steps, EVERYTHING - {"prefill", "one token", "long prompt"}),
    ],
)
def test_a_fault_that_few_scenarios_see_fails_those_alone(
    fault: faults.Fault, seeing: set[str], tmp_path: Path
) -> None:
    report = judged(faults.plant(fault, artifact(padding="right"), tmp_path / "broken"))
    assert seeing <= seen_in(report) <= seeing | {"KL divergence", "top-1 tokens", "greedy tokens"}


def test_one_bit_that_differs_from_run_to_run_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    client, runs = Client(Artifact(artifact(padding="right")), 131), count()
    assert same_bits(client).passed
    whole = client.runner.run_all

    def restless(*args: Any) -> Any:
        outputs, caches = whole(*args)
        outputs["logits"][0, 0, 0] = np.nextafter(outputs["logits"][0, 0, 0], np.float32(next(runs) % 3 * 100))
        return outputs, caches

    monkeypatch.setattr(client.runner, "run_all", restless)
    assert not same_bits(client).passed


def test_where_only_the_choices_are_wrong_the_furthest_scenario_is_drilled(tmp_path: Path) -> None:
    broken = faults.plant(faults.drop_bias, artifact(padding="right"), tmp_path / "broken")
    report = judged(broken, thresholds=Thresholds(error=1e9, kl=1e30, greedy=-1.0))
    assert seen_in(report) == {"greedy tokens"}
    assert report.drill is not None and report.drill.stages


def test_widths_of_the_middle_are_in_the_verdict(tmp_path: Path) -> None:
    report = judged(faults.plant(faults.drop_bias, artifact(padding="right"), tmp_path / "broken"), quick=True)
    assert report.drill is not None
    assert f"mid {report.widths[1]['mlp.mid']}" in report.drill.verdict


def test_compiling_finds_every_fault_too(tmp_path: Path) -> None:
    for case, (fault, padding, _, _) in FAULTS.items():
        broken = faults.plant(fault, artifact(padding=padding), tmp_path / case)
        assert not judged(broken, quick=True).passed, case
