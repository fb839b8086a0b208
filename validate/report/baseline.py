"""Is this report worse than an earlier one?"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dispc.support.errors import ArtifactError
from dispc.support.inputs import read_object
from dispc.validate.checks.check import Check
from dispc.validate.report.report import Report, report_of

SAME = ("target", "dtype", "judged_on", "truth", "seed")
"""What two reports must agree on for their figures to mean the same."""
SAME_TEXT = ("data", "windows", "sequence_length", "tokens_scored", "tokens_sha256")


def compare(report: Report, older: Report, max_regression: float) -> Report:
    """`report` with a check for each figure of an `older` one (`read_report`): worse by at most that share of it.

    Figures are parity errors (whose share is of their limit: far below it they are noise), perplexity, bytes, and
    latencies (p50). One that this report lacks has failed: nobody looked. Latencies of another processor, or with
    another number of threads, are not compared. What only this report has is new, and not compared.

    Raises:
        ArtifactError: when the two are of different things, such as another dtype or another text.
    """
    _require_same(older, report)
    figures = dict(_figures(report))
    checks = []
    for name, (before, scale, group) in _figures(older):
        title = f"baseline: {name}"
        before_on, now_on = (_timed_on(each) for each in (older, report))
        if group == "latency" and name in figures and before_on != now_on:
            checks.append(Check.skipped(title, "baseline", f"timed on {before_on}, this report on {now_on}"))
        elif name not in figures:
            checks.append(Check.failed(title, "baseline", "in the earlier report, and not measured in this one"))
        else:
            basis = scale if group == "parity" else before or scale
            checks.append(_compare(title, before, figures[name][0], basis, max_regression))
    return replace(report, checks=report.checks + tuple(checks))


def read_report(path: Path) -> Report:
    """A report that `--json-file` wrote.

    Raises:
        ArtifactError: when it is none.
    """
    try:
        content = read_object(path, ArtifactError)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such report") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(content.get("checks"), list) or "bytes" not in content:
        raise ArtifactError(f"{path}: is no report of dispc validate")
    report = report_of(content, path)
    if report.perplexity and "artifact" not in report.perplexity:
        raise ArtifactError(f"{path}: its perplexity names no artifact")
    return report


def _require_same(older: Report, newer: Report) -> None:
    pairs = [(name.replace("_", " "), getattr(older, name), getattr(newer, name)) for name in SAME]
    if older.perplexity and newer.perplexity:
        before, now = older.perplexity["artifact"], newer.perplexity["artifact"]
        pairs += [(f"perplexity's {name}", getattr(before, name), getattr(now, name)) for name in SAME_TEXT]
    for what, before, now in pairs:
        if before != now:
            raise ArtifactError(f"--baseline: its {what} is {before}, here {now}; make a new baseline")


def _figures(report: Report) -> Iterator[tuple[str, tuple[float, float, str]]]:
    """Name -> figure, the scale that a worsening from nothing is measured on, and the group."""
    for check in report.checks:
        if check.group == "parity" and check.status != "skipped" and check.limit is not None:
            yield check.name, (_number(check.figure), check.limit, "parity")
    if report.perplexity:
        yield "perplexity", (_number(report.perplexity["artifact"].perplexity), 1.0, "perplexity")
    yield "bytes", (float(report.bytes), 1.0, "bytes")
    for row in report.latency.rows if report.latency else ():
        if row.artifact == "artifact":
            yield f"{row.name} p50", (row.p50, 1.0, "latency")


def _number(figure: float | None) -> float:
    """A figure, infinite where it is none or no number: a stored report cannot tell these apart."""
    return figure if figure is not None and math.isfinite(figure) else math.inf


def _timed_on(report: Report) -> str:
    """Processor and threads of a report's latencies."""
    return report.device + (f" with {report.latency.threads} threads" if report.latency else "")


def _compare(title: str, before: float, now: float, basis: float, max_regression: float) -> Check:
    """Worse by a share of the `basis`."""
    unchanged = now == before or math.isinf(before)  # nothing is worse than that
    worse = 0.0 if unchanged else (now - before) / basis if basis else math.inf
    return Check.against(title, "baseline", worse, max_regression, "worse", f"{before:.6g} before, {now:.6g} now")
