"""Is this report worse than an earlier one?"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dispc.errors import ArtifactError
from dispc.validate.report import Check, Report


def compare(report: Report, path: Path, max_regression: float) -> Report:
    """`report` with a check for each figure that it shares with the report in `path`: worse by at most that share.

    Figures are parity errors, perplexity, bytes, and latencies (p50). What only one of the two has is not compared.

    Raises:
        ArtifactError: when `path` holds no report.
    """
    older = dict(_figures(read_report(path)))
    newer = dict(_figures(report.as_dict()))
    shared = [name for name in newer if name in older]
    if not shared:
        raise ArtifactError(f"{path}: has no figure in common with this report; nothing could be compared")
    checks = tuple(_compare(name, older[name], newer[name], max_regression) for name in shared)
    return replace(report, checks=report.checks + checks)


def read_report(path: Path) -> dict[str, Any]:
    """A report that `--json-file` wrote.

    Raises:
        ArtifactError: when it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such report") from error
    except ValueError as error:
        raise ArtifactError(f"{path}: is no report of dispc validate ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("checks"), list) or "bytes" not in content:
        raise ArtifactError(f"{path}: is no report of dispc validate")
    return content


def _figures(report: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for check in report["checks"]:
        if check["group"] == "parity" and check["status"] != "skipped" and check["limit"] is not None:
            yield check["name"], math.inf if check["figure"] is None else float(check["figure"])
    if report.get("perplexity"):
        yield "perplexity", float(report["perplexity"]["artifact"]["perplexity"])
    yield "bytes", float(report["bytes"])
    for row in (report.get("latency") or {}).get("rows", ()):
        if row["artifact"] == "artifact":
            yield f"{row['name']} p50", float(row["p50"])


def _compare(name: str, older: float, newer: float, max_regression: float) -> Check:
    worse = newer / older - 1 if older else (0.0 if newer == 0 else math.inf)
    detail = f"{older:.6g} before, {newer:.6g} now"
    return Check.against(f"baseline: {name}", "baseline", worse, max_regression, "worse", detail)
