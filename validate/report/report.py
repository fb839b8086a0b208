"""What a validation found: checks, and what was measured beside them; as JSON, Markdown and JUnit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from dispc.evaluate.perplexity import Perplexity
from dispc.runtime.latency import Latency, LatencyRow
from dispc.support.errors import ArtifactError
from dispc.support.files import plain
from dispc.support.printable import markdown_cell
from dispc.support.typed_json import OPTIONAL, from_json, to_json
from dispc.validate.checks.check import Check


@dataclass(frozen=True, kw_only=True)
class StreamError:
    """The residual stream after one sub-layer (or after the embedding, or the logits): largest errors over all rows.

    `ratio` is the error over its own: what the dtype costs by itself. Sub-layers have their block, part and widths.
    """

    name: str
    error: float
    own_error: float
    ratio: float
    worst_dimensions: tuple[int, ...]
    block: int | None = field(default=None, metadata=OPTIONAL)
    part: str | None = field(default=None, metadata=OPTIONAL)
    read: int | None = field(default=None, metadata=OPTIONAL)
    mid: int | None = field(default=None, metadata=OPTIONAL)
    write: int | None = field(default=None, metadata=OPTIONAL)

    @property
    def widths(self) -> str:
        """The widths of a sub-layer in words; empty for what is none."""
        widths = {"read": self.read, "mid": self.mid, "write": self.write}
        return ", ".join(f"{name} {width}" for name, width in widths.items() if width is not None)


@dataclass(frozen=True, kw_only=True)
class Drill:
    """Which sub-layer is the first over its `limit`, in which scenario; the verdict is None where none is.

    Where there was nothing to compare, there are no stages and the verdict says why.
    """

    verdict: str | None
    scenario: str
    limit: float
    lowering: str | None = field(default=None, metadata=OPTIONAL)
    stages: tuple[StreamError, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """All checks of one artifact, and what else was measured.

    `judged_on` says on which provider and in which precision, `device` names the processor.
    """

    artifact: str
    reference: str
    target: str
    dtype: str
    padding: str
    lowering: str
    judged_on: str
    device: str
    truth: str
    versions: Mapping[str, str]
    bytes: int
    checks: tuple[Check, ...]
    widths: tuple[Mapping[str, int], ...]
    full_widths: Mapping[str, int]
    drill: Drill | None = None
    perplexity: Mapping[str, Perplexity] | None = None
    placement: Mapping[str, object] | None = None
    latency: Latency | None = None
    quick: bool = False
    seed: int = 0

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def headline(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        return f"Validation {verdict}, judged on {self.judged_on}; truth: {self.truth}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; figures that are not finite become null."""
        content: dict[str, Any] = plain(to_json(self) | {"passed": self.passed, "headline": self.headline})
        for check, row in zip(self.checks, content["checks"], strict=True):
            row["passed"] = check.passed
        return content

    def markdown(self) -> str:
        """A summary for a CI job: headline, table of checks, drill and latency in short."""
        mark = {"passed": "✅", "failed": "❌", "skipped": "⏭️", "noted": "📝"}
        lines = [f"## {mark['passed' if self.passed else 'failed']} {self.headline}", ""]
        lines += [f"`{self.artifact}` against `{self.reference}`", ""]
        lines += ["| | check | figure | limit | over |", "|---|---|---:|---:|---|"]
        for check in self.checks:
            cells = (mark[check.status], check.name, *figure_and_limit(check), check.detail)
            lines.append("| " + " | ".join(map(markdown_cell, cells)) + " |")
        if self.drill and self.drill.verdict:
            lines += ["", f"**{self.drill.verdict}**"]
        if self.latency:
            lines += ["", f"Latency on {self.device}:", "", f"| | | {' | '.join(LATENCY_COLUMNS)} |"]
            lines += ["|---|---|" + "---:|" * len(LATENCY_COLUMNS)]
            lines += [f"| {' | '.join(latency_cells(row, self.latency))} |" for row in self.latency.rows]
        return "\n".join(lines) + "\n"

    def junit(self) -> str:
        """One test case per check, in the XML that CI systems read."""
        counts = {status: str(sum(c.status == status for c in self.checks)) for status in ("failed", "skipped")}
        attributes = {"tests": str(len(self.checks)), "failures": counts["failed"], "errors": "0"}
        root = ElementTree.Element("testsuites", attributes)
        suite = ElementTree.SubElement(
            root, "testsuite", attributes | {"name": "dispc validate", "skipped": counts["skipped"]}
        )
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in (("artifact", self.artifact), ("reference", self.reference), ("headline", self.headline)):
            ElementTree.SubElement(properties, "property", name=name, value=_xml(value))
        for check in self.checks:
            case = ElementTree.SubElement(
                suite, "testcase", name=_xml(check.name), classname=f"dispc.validate.{check.group}"
            )
            figure, limit = figure_and_limit(check)
            if check.status == "skipped":
                ElementTree.SubElement(case, "skipped", message=_xml(check.detail))
            elif check.status == "failed":
                message = _xml(f"{figure} against a limit of {limit}" if limit else check.detail)
                ElementTree.SubElement(case, "failure", message=message).text = _xml(check.detail)
            else:
                ElementTree.SubElement(case, "system-out").text = _xml(f"{figure} (limit {limit}): {check.detail}")
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def junit_error(artifact: str, reason: str) -> str:
    """What a validation that could not run leaves where JUnit XML was asked for."""
    root = ElementTree.Element("testsuites", tests="1", failures="0", errors="1")
    suite = ElementTree.SubElement(
        root, "testsuite", name="dispc validate", tests="1", failures="0", errors="1", skipped="0"
    )
    case = ElementTree.SubElement(suite, "testcase", name=_xml(artifact), classname="dispc.validate")
    ElementTree.SubElement(case, "error", message=_xml(reason)).text = _xml(reason)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown_error(artifact: str, reason: str) -> str:
    """The same, for the summary of a CI job."""
    return f"## ❌ Validation could not run\n\n`{artifact}`: {reason}\n"


LATENCY_COLUMNS = ("p50 ms", "p90", "p99", "tokens/s", "over dense", "GB/s (of a copy)")


def latency_cells(row: LatencyRow, latency: Latency) -> tuple[str, ...]:
    """A row of the latency table: its name, which artifact, then LATENCY_COLUMNS; empty where there is no figure."""
    times = (f"{figure:.2f}" for figure in (row.p50, row.p90, row.p99))
    compared = row.artifact == "artifact" and row.name in latency.speedup
    speed = f"{latency.speedup[row.name]:.2f}x" if compared else ""
    copy = ""
    if row.bytes_per_second is not None and row.share_of_copy is not None:
        copy = f"{row.bytes_per_second / 1e9:.1f} ({100 * row.share_of_copy:.0f} %)"
    return (row.name, row.artifact, *times, f"{row.tokens_per_second:,.1f}", speed, copy)


def figure_and_limit(check: Check) -> tuple[str, str]:
    """How a check's figure and limit are shown; a figure that is not finite is inf, which JSON holds as null."""
    if check.status == "skipped" or (check.figure is None and check.limit is None):
        return "", ""
    finite_figure = check.figure is not None and math.isfinite(check.figure)
    figure = f"{check.figure:.3g}" if finite_figure else "inf"
    limit = "" if check.limit is None else f"{check.limit:.3g} {check.unit}".strip()
    return figure, limit


def report_of(content: object, where: object) -> Report:
    """A report from what `Report.as_dict` made of it; `where` names it in errors.

    Raises:
        ArtifactError: when it is none.
    """
    return from_json(Report, content, where, ArtifactError)


def _xml(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(c for c in text if c in "\t\n" or (c >= " " and c not in "\ufffe\uffff"))
