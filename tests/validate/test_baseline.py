"""A validation against the report of an earlier one: what got worse, or is no longer measured, has failed."""

import json
import math
from pathlib import Path
from typing import Any

import command
import pytest
from artifacts import originals, reports

from dispc.evaluate.perplexity import Perplexity
from dispc.runtime.latency import Latency, LatencyRow
from dispc.support.errors import ArtifactError
from dispc.validate import Report
from dispc.validate.checks.check import Check
from dispc.validate.report.baseline import compare, read_report
from dispc.validate.report.report import report_of


def older(report: dict[str, Any]) -> Report:
    """As it comes back from a file."""
    return report_of(json.loads(json.dumps(report)), "report.json")


def regressions(report: Report) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


def test_a_report_is_no_worse_than_itself_and_worse_than_a_better_one() -> None:
    good = reports()[0]
    same = compare(good, older(good.as_dict()), 0.0)
    added = {check.name: check for check in same.checks if check.group == "baseline"}
    assert same.passed and {"baseline: prefill", "baseline: KL divergence", "baseline: bytes"} <= set(added)
    assert "baseline: padding of the other side" not in added  # never judged, so never worse
    for name, change in (("bytes", lambda r: r.update(bytes=r["bytes"] // 2)), ("prefill", halve_prefill)):
        better = good.as_dict()
        change(better)
        assert regressions(compare(good, older(better), 0.05)) == [f"baseline: {name}"]
        assert compare(good, older(better), 1.1).passed


def halve_prefill(report: dict[str, Any]) -> None:
    row = next(check for check in report["checks"] if check["name"] == "prefill")
    row["figure"] /= 2


def measured(p50: float = 10.0, perplexity: float = 20.0, threads: int = 1, **facts: Any) -> Report:
    """The good report with a latency and a perplexity that nobody measured."""
    row = LatencyRow(
        artifact="artifact", name="one token", p50=p50, p90=p50, p99=p50, tokens_per_second=1.0, cuda_graph=False
    )
    latency = Latency(
        rows=(row,),
        speedup={},
        copy_bytes_per_second=1.0,
        peak_bytes=None,
        operators=(),
        gather_scatter_share=0.0,
        provider="",
        threads=threads,
        threads_chosen_by="",
        rounds=1,
        warmup=0,
        dense=None,
    )
    text = Perplexity(
        perplexity=perplexity,
        mean_nll=1.0,
        windows=2,
        sequence_length=8,
        tokens_scored=14,
        data="t",
        tokens_sha256="",
    )
    extra = {"latency": latency, "perplexity": {"artifact": text}}
    return Report(**{**reports()[0].__dict__, **extra, **facts})


@pytest.mark.parametrize(
    ("p50", "perplexity", "failing"),
    [(10.4, 20.9, []), (10.6, 20.0, ["baseline: one token p50"]), (10.0, 21.1, ["baseline: perplexity"])],
)
def test_latency_and_perplexity_are_compared(p50: float, perplexity: float, failing: list[str]) -> None:
    assert regressions(compare(measured(p50, perplexity), older(measured().as_dict()), 0.05)) == failing


def test_what_was_infinite_cannot_get_worse_and_what_becomes_infinite_is_worse() -> None:
    def report(perplexity: float, prefill: float) -> Report:
        checks = (Check.against("prefill", "parity", prefill, 4.0, "of its own error", ""),)
        return measured(perplexity=perplexity, checks=checks)

    whole, broken = report(20.0, 1.0), report(math.inf, math.inf)
    assert [check.name for check in compare(whole, older(broken.as_dict()), 0.05).checks if not check.passed] == []
    worse = compare(broken, older(whole.as_dict()), 0.05)
    assert {"baseline: prefill", "baseline: perplexity"} <= set(regressions(worse))


def test_what_is_no_longer_measured_has_failed() -> None:
    assert regressions(compare(reports()[0], older(measured().as_dict()), 0.05)) == [
        "baseline: perplexity",
        "baseline: one token p50",
    ]
    fewer = Report(**{**reports()[0].__dict__, "checks": reports()[0].checks[:2]})
    assert "baseline: decode" in regressions(compare(fewer, older(reports()[0].as_dict()), 0.05))
    assert compare(measured(), older(reports()[0].as_dict()), 0.05).passed  # what is new has nothing to be worse than


def test_latencies_of_two_processors_are_not_compared() -> None:
    compared = compare(measured(p50=99.0, device="a fast one"), older(measured(device="a slow one").as_dict()), 0.05)
    (skipped,) = [check for check in compared.checks if check.name == "baseline: one token p50"]
    assert compared.passed and (skipped.status, "a slow one" in skipped.detail) == ("skipped", True)


def test_latencies_of_other_threads_are_not_compared() -> None:
    before, now = measured(p50=10.0, threads=1), measured(p50=99.0, threads=2)
    compared = compare(now, older(before.as_dict()), 0.05)
    (skipped,) = [check for check in compared.checks if check.name == "baseline: one token p50"]
    assert skipped.status == "skipped" and "with 1 threads, this report on" in skipped.detail
    assert not compare(now, older(measured(p50=10.0, threads=2).as_dict()), 0.05).passed


@pytest.mark.parametrize(
    "change", [{"dtype": "float16"}, {"judged_on": "elsewhere"}, {"truth": "another"}, {"seed": 1}]
)
def test_reports_of_different_things_are_not_compared(change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="make a new baseline"):
        compare(measured(), older(measured().as_dict() | change), 0.05)


def test_perplexities_of_different_texts_are_not_compared() -> None:
    another = measured().as_dict()
    another["perplexity"]["artifact"]["windows"] = 3
    with pytest.raises(ArtifactError, match="perplexity's windows is 3, here 2"):
        compare(measured(), older(another), 0.05)
    another = measured().as_dict()
    another["perplexity"]["artifact"]["tokens_sha256"] = "other words, as many of them"
    with pytest.raises(ArtifactError, match="perplexity's tokens_sha256 is other words"):
        compare(measured(), older(another), 0.05)


@pytest.mark.parametrize(("share", "failing"), [(0.0004, []), (0.002, ["baseline: top-1 tokens"])])
def test_worse_than_nothing_is_measured_by_the_limit(share: float, failing: list[str]) -> None:
    def report(figure: float) -> Report:
        return Report(**{**reports()[0].__dict__, "checks": (top1(figure),)})

    def top1(figure: float) -> Check:
        return Check.against("top-1 tokens", "parity", figure, 0.01, "of the positions", "")

    assert regressions(compare(report(share), older(report(0.0).as_dict()), 0.05)) == failing


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not valid JSON"),
        ("[]", "a JSON object is expected"),
        ("{}", "is no report"),
        ('{"checks": 1}', "is no report"),
        ('{"checks": [], "bytes": 1}', "artifact is missing or malformed"),
    ],
)
def test_what_is_no_report_cannot_be_a_baseline(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ArtifactError, match=rf"x\.json: {says}"):
        read_report(tmp_path / "x.json")
    with pytest.raises(ArtifactError, match="no such report"):
        read_report(tmp_path / "lost.json")


def test_regression_is_exit_code_1_and_nonsense_2(tmp_path: Path) -> None:
    good, _, model = originals()
    better = reports()[0].as_dict()
    better["bytes"] = better["bytes"] * 9 // 10
    file = tmp_path / "report.json"
    file.write_text(json.dumps(better))
    line = ("validate", good, "-r", model, "--baseline", file)
    assert command.run(*line, "--max-regression", "1000%").code == 0
    outcome = command.run(*line, "--max-regression", "5%", "--json")
    failed = [check["name"] for check in json.loads(outcome.out)["checks"] if not check["passed"]]
    assert (outcome.code, failed) == (1, ["baseline: bytes"])
    for text in ("much", "-5%", "inf"):
        command.assert_refused(tmp_path, *line, "--max-regression", text, says=("--max-regression", "5%"))


def test_one_file_may_be_the_baseline_and_the_new_report(tmp_path: Path) -> None:
    good, _, model = originals()
    file = tmp_path / "report.json"
    file.write_text(json.dumps(reports()[0].as_dict()))
    line = ("validate", good, "-r", model, "--baseline", file, "--json-file", file)
    assert command.run(*line, "--max-regression", "1000%").code == 0
    assert any(check["name"] == "baseline: prefill" for check in json.loads(file.read_text())["checks"])
