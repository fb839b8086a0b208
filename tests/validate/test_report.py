"""What leaves a validation: exit codes by threshold, JSON, JUnit, Markdown, HTML, comparison with a baseline."""

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import command
import numpy as np
import pytest
from artifacts import originals, reports
from language import make_student
from rich.console import Console

from dispc.cli.checks import latency_tables
from dispc.compiler import CompileOptions, compile_model
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.runtime.latency import Latency, LatencyRow
from dispc.runtime.profile import OperatorTime
from dispc.support.errors import DispcError
from dispc.validate import CheckOptions, LatencyOptions, Report, check
from dispc.validate.checks.check import Check
from dispc.validate.checks.static import check_file
from dispc.validate.report.html import page

# Thresholds


def test_each_threshold_below_what_was_measured_is_exit_code_1(tmp_path: Path) -> None:
    """Over text: a learned model, so that perplexity means something; float16, so that no figure is zero."""
    model = make_student("llama", tmp_path / "model", steps=20)
    Masks.random(Checkpoint(model).config, 0.2, 1).save(model / "masks.safetensors", Checkpoint(model).config)
    (tmp_path / "text.txt").write_text("the sea is salt and deep blue " * 60)
    compile_model(
        CompileOptions(model=model, output=tmp_path / "out", target="onnx-cuda", dtype="float16", validate=False)
    )
    line: tuple[object, ...] = ("validate", tmp_path / "out", "-r", model, "--on-cpu", "--json")
    line += ("--data", tmp_path / "text.txt", "--sequence-length", 64, "--max-windows", 4)
    outcome = command.run(*line)
    assert outcome.code == 0, outcome
    found = {check["name"]: check for check in json.loads(outcome.out)["checks"]}
    options = {"prefill": "--max-error", "KL divergence": "--max-kl", "perplexity": "--max-perplexity"}
    below: list[object] = []
    for name, option in options.items():
        assert found[name]["figure"] > 0, name
        below += [option, 0.9 * found[name]["figure"]]
    outcome = command.run(*line, *below)
    assert outcome.code == 1
    failed = {check["name"] for check in json.loads(outcome.out)["checks"] if not check["passed"]}
    assert set(options) <= failed
    shown = json.loads(outcome.out)["checks"]
    assert all(c["limit"] is not None for c in shown if c["group"] == "parity" and c["status"] == "passed")


def test_choices_have_thresholds_of_their_own() -> None:
    """A broken artifact with all limits open fails for its weights alone, and with one closed for that too."""
    _, broken, model = originals()
    found = {check.name: check.figure for check in reports()[1].checks}
    top1, greedy = found["top-1 tokens"], found["greedy tokens"]
    assert top1 and greedy
    open_limits = ("--max-error", 1e12, "--max-kl", 1e30)
    outcome = command.run("validate", broken, "-r", model, *open_limits, "--max-top1", 1, "--max-greedy", 1, "--json")
    checks = {check["name"]: check["status"] for check in json.loads(outcome.out)["checks"]}
    assert [name for name, status in checks.items() if status == "failed"] == ["weights"]
    # ties are what the error budget says: only a closed budget makes the choices count
    for option, other in (("--max-top1", "--max-greedy"), ("--max-greedy", "--max-top1")):
        outcome = command.run(
            "validate", broken, "-r", model, "--max-error", 4, "--max-kl", 1e30, option, 0, other, 1, "--json"
        )
        names = {"--max-top1": "top-1 tokens", "--max-greedy": "greedy tokens"}
        checks = {check["name"]: check for check in json.loads(outcome.out)["checks"]}
        assert (outcome.code, checks[names[option]]["status"]) == (1, "failed")
        assert checks[names[other]]["status"] == "passed"


# Forms


def timed() -> Report:
    """The broken report with latencies that nobody measured."""

    def row(artifact: str, kind: str, p50: float) -> LatencyRow:
        decodes = kind == "one token"
        return LatencyRow(
            artifact=artifact,
            name=f"{kind}, batch 1, past 8",
            p50=p50,
            p90=p50,
            p99=p50,
            tokens_per_second=1000 / p50,
            cuda_graph=False,
            bytes_per_token=5 * 10**6 if decodes else None,
            bytes_per_second=1e9 if decodes else None,
            share_of_copy=0.25 if decodes else None,
        )

    cases = (("artifact", "one token", 5.0), ("dense", "one token", 11.0))
    cases += (("artifact", "first token", 7.0), ("dense", "first token", 9.0))
    latency = Latency(
        rows=tuple(row(*case) for case in cases),
        speedup={"one token, batch 1, past 8": 2.2, "first token, batch 1, past 8": 9 / 7},
        operators=(OperatorTime("MatMul", 3.0, 0.6),),
        gather_scatter_share=0.125,
        provider="CPUExecutionProvider",
        threads=2,
        threads_chosen_by="option",
        rounds=3,
        warmup=1,
        peak_bytes=2**28,
        copy_bytes_per_second=4e9,
        dense="other",
    )
    return replace(reports()[1], latency=latency)


def test_every_form_of_the_report_shows_the_latencies() -> None:
    report = timed()
    console = Console(width=200, record=True, file=io.StringIO())
    for table in latency_tables(report.latency, report.device):
        console.print(table)
    shown = console.export_text()
    for text in (report.markdown(), page(report), shown):
        for figure in ("5.00", "11.00", "2.20x", "1.29x", "1.0 (25 %)", "200.0", "one token, batch 1, past 8", "dense"):
            assert figure in text
    for text in (page(report), shown):
        assert "MatMul" in text and "256 MiB" in text
    lines = [line for line in report.markdown().splitlines() if "past 8" in line]
    assert [line.split(" | ")[1] for line in lines] == ["artifact", "dense"] * 2


def test_json_is_strict_and_holds_every_field_of_the_report() -> None:
    for report in reports():
        found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
        assert set(found) == set(report.__dataclass_fields__) | {"passed", "headline"}
        assert found["passed"] == all(check["passed"] for check in found["checks"])
    poisoned = Check.against("x", "parity", float("nan"), 4.0, "", "")
    assert poisoned.status == "failed"


def test_junit_has_one_case_per_check_and_the_failures_of_the_report() -> None:
    for report in reports():
        root = ElementTree.fromstring(report.junit())
        cases = {case.get("name"): case for case in root.iter("testcase")}
        assert list(cases) == [check.name for check in report.checks]
        for each in report.checks:
            case = cases[each.name]
            assert case.get("classname") == f"dispc.validate.{each.group}"
            assert (case.find("failure") is not None) == (each.status == "failed")
            assert (case.find("skipped") is not None) == (each.status == "skipped")
        (suite,) = root
        failures = sum(not check.passed for check in report.checks)
        assert suite.get("tests") == root.get("tests") == str(len(report.checks))
        assert suite.get("failures") == root.get("failures") == str(failures)
        assert suite.get("skipped") == str(sum(check.status == "skipped" for check in report.checks))


def test_text_that_xml_and_tables_cannot_hold_does_no_harm() -> None:
    good = reports()[0]
    nasty = Check.failed("a|b <&> \x00\x1b\ufffe\uffff", "parity", "[bold]x[/] | \x07 </td>")
    report = Report(**{**good.__dict__, "checks": (nasty,), "artifact": "/a<b>&"})
    assert ElementTree.fromstring(report.junit()).find(".//failure") is not None
    assert "a&#124;b &#60;" in report.markdown()
    assert "</td> <" not in page(report) and "/a&lt;b&gt;&amp;" in page(report)


def test_markdown_says_what_failed_and_where() -> None:
    good, broken = (report.markdown() for report in reports())
    assert good.startswith("## ✅ Validation passed") and "❌" not in good
    assert broken.startswith("## ❌ Validation FAILED") and "the first to be wrong is block 1 mlp" in broken
    rows = [line for line in good.splitlines() if line.startswith("| ✅")]
    assert all(len(re.split(r"(?<!\\)\|", line)) == 7 for line in rows)


def test_every_file_is_written_and_none_but_those(tmp_path: Path) -> None:
    good, _, model = originals()
    files = {option: tmp_path / "deep" / f"report.{option}" for option in ("junit", "html", "markdown")}
    options = [part for option, path in files.items() for part in (f"--{option}", path)]
    outcome = command.run("validate", good, "-r", model, *options)
    assert outcome.code == 0, outcome
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["report.html", "report.junit", "report.markdown"]
    assert "Error per block" in files["html"].read_text(encoding="utf-8")  # --html drills


# The page


def test_the_page_needs_nothing_else_and_shows_everything() -> None:
    good, broken = (page(report) for report in reports())
    for text in (good, broken):
        assert not re.search(r"<script|<link|<img|@import|url\(|https?://|src=", text)
        assert "prefers-color-scheme: dark" in text
        for heading in ("Checks", "What was compared", "Error per block", "Widths per block"):
            assert f"<h2>{heading}</h2>" in text
    assert "PASSED" in good and "Where it broke" not in good
    assert "FAILED" in broken and "Where it broke" in broken
    assert 'class="bad"' in broken and 'class="bad"' not in good


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


@pytest.mark.extras
@pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize(("scheme", "bright"), [("light", True), ("dark", False)])
def test_the_page_is_legible_in_a_browser_in_light_and_dark(scheme: str, bright: bool, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "report.html").write_text(page(timed()), encoding="utf-8")
    shot = tmp_path / "shot.png"
    subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--screenshot={shot}",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1000,1400",
            f"--blink-settings=preferredColorScheme={1 if bright else 0}",
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        check=True,
        timeout=120,
    )
    pixels = np.asarray(image.open(shot).convert("RGB")).astype(int)
    background = pixels[5, 5]
    assert (background.mean() > 200) == bright
    drawn = np.abs(pixels - background).sum(axis=2) > 60
    assert 0.01 < drawn.mean() < 0.5
    assert drawn[:, -8:].mean() == 0  # nothing runs over the right edge
    red = (pixels[..., 0] - pixels[..., 1:].max(axis=2) > 60).sum()
    assert red > 500  # the verdict and the failed checks


def test_inputs_that_cannot_be_read_are_told_before_anything_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    good, _, model = originals()
    monkeypatch.setattr("dispc.validate.comparison.run_scenario", lambda *args, **options: pytest.fail("judged"))
    for options in ({"data": "lost.txt"}, {"baseline": Path("lost.json")}, {"latency": LatencyOptions(pasts=(999,))}):
        with pytest.raises(DispcError):
            check(good, model, CheckOptions(**options))  # type: ignore[arg-type]


def test_a_validation_that_cannot_run_leaves_no_report_of_an_earlier_one(tmp_path: Path) -> None:
    good, _, model = originals()
    names = {option: tmp_path / "reports" / option for option in ("json-file", "junit", "html", "markdown")}
    line: list[object] = ["validate", good, "-r", model, "--data", tmp_path / "lost.txt"]
    line += [word for option, path in names.items() for word in (f"--{option}", path)]
    names["junit"].parent.mkdir()
    for path in names.values():
        path.write_text("passed")
    outcome = command.run(*line)
    assert outcome.code == 2
    assert not names["json-file"].exists() and not names["html"].exists()
    (case,) = ElementTree.parse(names["junit"]).iter("testcase")
    (error,) = case
    assert error.tag == "error" and "lost.txt" in error.attrib["message"]
    assert "could not run" in names["markdown"].read_text() and "lost.txt" in names["markdown"].read_text()


# Without running anything


def test_operators_of_foreign_domains_fail(tmp_path: Path) -> None:
    good, _, _ = originals()
    assert check_file(good / "model.onnx", "onnx-cpu").passed
    standard = check_file(good / "model.onnx", "onnx")  # GroupQueryAttention is ONNX Runtime's own
    assert not standard.passed and "com.microsoft" in standard.detail
    (tmp_path / "model.onnx").write_bytes((good / "model.onnx").read_bytes()[:200])
    assert not check_file(tmp_path / "model.onnx", "onnx").passed


def test_unknown_truth_dtypes_are_refused() -> None:
    good, _, model = originals()
    with pytest.raises(DispcError, match="float64 or float32"):
        check(good, model, CheckOptions(reference_dtype="float8"))


def test_an_option_that_is_nonsense_leaves_no_report_of_an_earlier_run(tmp_path: Path) -> None:
    good, _, model = originals()
    junit = tmp_path / "report.xml"
    junit.write_text("passed")
    assert command.run("validate", good, "-r", model, "--max-regression", "much", "--junit", junit).code == 2
    assert ElementTree.parse(junit).find(".//error") is not None
