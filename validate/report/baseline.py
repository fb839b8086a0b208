"""Is this report worse than an earlier one?"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dispc.support.check import Check
from dispc.support.errors import ArtifactError
from dispc.support.inputs import read_object
from dispc.validate.report.report import Report

SAME = ("target", "dtype", "judged_on", "truth", "seed")
"""What two reports must agree on for their figures to mean the same."""
SAME_TEXT = ("data", "windows", "sequence_length", "tokens_scored", "tokens_sha256")


def compare(report: Report, older: dict[str, Any], max_regression: float) -> Report:
    """`report` with a check for each figure of an `older` one (`read_report`): worse by at most that share of it.

    Figures are parity errors (whose share is of their limit: far below it they are noise), perplexity, bytes, and
    latencies (p50). One that this report lacks has failed: nobody looked. Latencies of another processor, or with
    another number of threads, are not compared. What only this report has is new, and not compared.

    Raises:
        ArtifactError: when the two are of different things, such as another dtype or another text.
    """
    newer = report.as_dict()
    _require_same(older, newer)
    figures = dict(_figures(newer))
    checks = []
    for name, (before, scale, group) in _figures(older):
        title = f"baseline: {name}"
        before_on, now_on = (_timed_on(each) for each in (older, newer))
        if group == "latency" and name in figures and before_on != now_on:
            checks.append(Check.skipped(title, "baseline", f"timed on {before_on}, this report on {now_on}"))
        elif name not in figures:
            checks.append(Check.failed(title, "baseline", "in the earlier report, and not measured in this one"))
        else:
            basis = scale if group == "parity" else before or scale
            checks.append(_compare(title, before, figures[name][0], basis, max_regression))
    return replace(report, checks=report.checks + tuple(checks))


def read_report(path: Path) -> dict[str, Any]:
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
    return content


def _require_same(older: dict[str, Any], newer: dict[str, Any]) -> None:
    pairs = [(name.replace("_", " "), older.get(name), newer[name]) for name in SAME]
    texts = [(report.get("perplexity") or {}).get("artifact") for report in (older, newer)]
    if texts[0] and texts[1]:
        pairs += [(f"perplexity's {name}", texts[0].get(name), texts[1].get(name)) for name in SAME_TEXT]
    for what, before, now in pairs:
        if before != now:
            raise ArtifactError(f"--baseline: its {what} is {before}, here {now}; make a new baseline")


def _figures(report: dict[str, Any]) -> Iterator[tuple[str, tuple[float, float, str]]]:
    """Name -> figure, the scale that a worsening from nothing is measured on, and the group."""
    for check in report["checks"]:
        if check["group"] == "parity" and check["status"] != "skipped" and check["limit"] is not None:
            yield check["name"], (_number(check["figure"]), float(check["limit"]), "parity")
    if report.get("perplexity"):
        yield "perplexity", (_number(report["perplexity"]["artifact"]["perplexity"]), 1.0, "perplexity")
    yield "bytes", (float(report["bytes"]), 1.0, "bytes")
    for row in (report.get("latency") or {}).get("rows", ()):
        if row["artifact"] == "artifact":
            yield f"{row['name']} p50", (float(row["p50"]), 1.0, "latency")


def _number(figure: float | None) -> float:
    """A figure of a report, which writes null where it is infinite or no number."""
    return math.inf if figure is None else float(figure)


def _timed_on(report: dict[str, Any]) -> str:
    """Processor and threads of a report's latencies."""
    threads = (report.get("latency") or {}).get("threads")
    return f"{report.get('device', 'an unknown processor')}" + (f" with {threads} threads" if threads else "")


def _compare(title: str, before: float, now: float, basis: float, max_regression: float) -> Check:
    """Worse by a share of the `basis`."""
    unchanged = now == before or math.isinf(before)  # nothing is worse than that
    worse = 0.0 if unchanged else (now - before) / basis if basis else math.inf
    return Check.against(title, "baseline", worse, max_regression, "worse", f"{before:.6g} before, {now:.6g} now")
