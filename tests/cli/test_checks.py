"""How a report looks in a terminal of 80 columns, and what long work says where there is none."""

import io
import time
from dataclasses import replace
from typing import Any

import pytest
from artifacts import reports
from rich.console import Console

from dispc.cli import heartbeat as heartbeats
from dispc.cli.checks import NAME_WIDTH, check_lines, doctor_lines, latency_tables
from dispc.cli.heartbeat import heartbeat
from dispc.runtime.doctor import Diagnosis, Finding
from dispc.runtime.latency import Latency, LatencyRow
from dispc.runtime.profile import OperatorTime
from dispc.validate import Report
from dispc.validate.checks.check import Check

LONG = "eight prompts of 1 to 64 tokens in one batch, " * 5


def report(*statuses: str) -> Report:
    """A report with a check of each status."""
    checks = tuple(
        Check(
            name=f"check {number} of a name that is not short",
            group="parity",
            status=status,  # type: ignore[arg-type]
            detail=LONG,
            figure=0.123456,
            limit=4.0,
            unit="x own divergence",
        )
        for number, status in enumerate(statuses)
    )
    return replace(reports()[0], checks=checks, drill=None, judged_on="the CPU", truth="float64")


def changed(report: Report, **changes: Any) -> Report:
    """The report with its first check changed."""
    return replace(report, checks=(replace(report.checks[0], **changes), *report.checks[1:]))


def lines(*shown: Any, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True, emoji=False)
    for item in shown:
        console.print(item)
    return console.export_text().splitlines()


def test_a_passed_check_is_one_line_of_80_columns() -> None:
    found = lines(check_lines(report("passed", "skipped", "noted", "passed")))
    assert len(found) == 5
    assert all(len(line) <= 80 for line in found)
    assert [line.split()[0] for line in found[1:]] == ["ok", "skip", "note", "ok"]
    assert "0.123 of 4 x own divergence" in found[1]


def test_the_detail_stands_under_a_failed_check_and_with_verbose_under_each() -> None:
    both = report("failed", "passed")
    found, verbose = lines(check_lines(both)), lines(check_lines(both, verbose=True))
    mark = next(number for number, line in enumerate(found) if line.startswith("FAIL"))
    assert found[mark + 1].startswith("     eight prompts") and found[-1].startswith("ok")
    assert " ".join("".join(verbose).split()).count("eight prompts") == 10
    assert all(len(line) <= 80 for line in (*found, *verbose))


def test_a_name_beyond_all_measure_is_cut_and_stays_one_line() -> None:
    long = changed(report("passed"), name="x" * 3 * NAME_WIDTH)
    assert [len(line) for line in lines(check_lines(long))[1:]] == [80]


def test_brackets_of_names_and_details_are_no_markup() -> None:
    odd = changed(report("failed"), name="[/b] [red]", detail="[bold] :smile:")
    assert "[/b] [red]" in lines(check_lines(odd))[1] and "[bold] :smile:" in lines(check_lines(odd))[2]


def test_latency_fits_80_columns_with_every_figure() -> None:
    row = LatencyRow(
        artifact="artifact",
        name="one token, batch 16, past 131072, CUDA graph",
        p50=12345.67,
        p90=12345.67,
        p99=12345.67,
        tokens_per_second=123456.7,
        cuda_graph=True,
        bytes_per_token=2**40,
        bytes_per_second=3.4e12,
        share_of_copy=0.99,
    )
    latency = Latency(
        rows=(row, replace(row, artifact="dense")),
        speedup={row.name: 12.34},
        operators=(OperatorTime("SkipSimplifiedLayerNormalization", 1.0, 0.5),),
        threads=64,
        threads_chosen_by="option",
        rounds=20,
        warmup=3,
        peak_bytes=2**36,
        copy_bytes_per_second=3.4e12,
        gather_scatter_share=0.1,
        provider="CUDAExecutionProvider",
        dense="dense",
    )
    found = lines(*latency_tables(latency, "NVIDIA H100 80GB HBM3"))
    assert all(len(line) <= 80 for line in found)
    (artifact,) = [line for line in found if line.strip().startswith("artifact") and "12345.67" in line]
    assert artifact.count("12345.67") == 3
    for figure in ("123,456.7", "12.34x", "3400.0 (99 %)"):
        assert figure in artifact


def test_what_the_doctor_advises_is_never_cut_and_said_once() -> None:
    command = (
        "pip uninstall -y onnxruntime; pip install --force-reinstall --no-deps onnxruntime-gpu==1.31.1  # " + "x" * 80
    )
    finding = Finding(name="libcudart.so.13", ok=False, detail="cannot be loaded", remedy=command)
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(doctor_lines(Diagnosis(problem="x", findings=(finding, finding), versions={})), soft_wrap=True)
    found = console.export_text().splitlines()
    assert [line.rstrip() for line in found[1:]] == [
        *["FAIL libcudart.so.13: cannot be loaded"] * 2,
        f"to do: {command}",
    ]


def test_long_work_says_what_it_does_where_no_bar_can_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "INTERVAL", 0.01)
    stream = io.StringIO()
    with heartbeat(Console(file=stream), "loading [it]") as tell:
        wait_for(stream, "loading [it] (")
        tell("asking the reference")
        wait_for(stream, "asking the reference (")
    said = stream.getvalue()
    time.sleep(0.05)
    assert stream.getvalue() == said  # it ends with the work


def test_short_work_and_terminals_hear_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, terminal = io.StringIO(), io.StringIO()
    with heartbeat(Console(file=quiet), "loading"):
        pass
    monkeypatch.setattr(heartbeats, "INTERVAL", 0.001)
    with heartbeat(Console(file=terminal, force_terminal=True), "loading"):
        time.sleep(0.02)
    assert quiet.getvalue() == terminal.getvalue() == ""


def wait_for(stream: io.StringIO, text: str) -> None:
    end = time.monotonic() + 60
    while text not in stream.getvalue():
        assert time.monotonic() < end, stream.getvalue()
        time.sleep(0.001)
