"""What `dispc validate`, `compile` and `doctor` found: a line for each check, and tables of latency."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dispc.runtime.doctor import Diagnosis
    from dispc.runtime.latency import Latency
    from dispc.validate.report.report import Report

MARKS = {"passed": ("ok", "green"), "failed": ("FAIL", "red"), "skipped": ("skip", "dim"), "noted": ("note", "")}
NAME_WIDTH = 40
"""Where the figures of most checks begin; a longer name pushes its own to the right."""


def check_lines(report: "Report", *, verbose: bool = False) -> Group:
    """The headline, a line per check, the detail of failed ones (with `verbose` of all), the drill's verdict.

    Lines are cut at the edge of the terminal; details are wrapped.
    """
    from dispc.validate.report.report import figure_and_limit

    width = min(NAME_WIDTH, max((len(check.name) for check in report.checks), default=0))
    shown: list[RenderableType] = [Text(report.headline, style="bold")]
    for check in report.checks:
        word, style = MARKS[check.status]
        figure, limit = figure_and_limit(check)
        line = Text(no_wrap=True, overflow="ellipsis").append(f"{word:<5}", style=style)
        line.append(f"{check.name:<{width}}  {figure:>9}{f' of {limit}' if limit else ''}".rstrip())
        shown.append(line)
        if check.detail and (verbose or check.status == "failed"):
            shown.append(Padding(Text(check.detail), (0, 0, 0, 5)))
    if report.drill and report.drill.verdict:
        shown.append(Text(report.drill.verdict))
    return Group(*shown)


def doctor_lines(diagnosis: "Diagnosis") -> Group:
    """A line for each finding, and every remedy once, on a line of its own."""
    shown = [Text("CUDA works" if diagnosis.problem is None else "CUDA does not work", style="bold")]
    for finding in diagnosis.findings:
        word, style = MARKS["passed" if finding.ok else "failed"]
        shown.append(Text(f"{word:<5}", style=style).append(f"{finding.name}: {finding.detail}", style="none"))
    remedies = dict.fromkeys(finding.remedy for finding in diagnosis.findings if finding.remedy)
    shown += [Text(f"to do: {remedy}") for remedy in remedies]
    return Group(*shown)


def latency_tables(latency: "Latency | None", device: str) -> list[RenderableType]:
    """Times of both artifacts, a table for each case, and time by operator type; nothing where nothing was timed."""
    from dispc.validate.report.report import LATENCY_COLUMNS, latency_cells

    if latency is None:
        return []
    facts = f"{latency.threads} threads, {latency.rounds} runs after {latency.warmup}"
    if latency.peak_bytes:
        facts += f", peak memory {latency.peak_bytes / 2**20:,.0f} MiB"
    facts += f", a copy moves {latency.copy_bytes_per_second / 1e9:.1f} GB/s"
    title = Text(f"Latency on {device} ({latency.provider}): {facts}")
    cases: dict[str, Table] = {}
    for row in latency.rows:
        name, *cells = latency_cells(row, latency)
        if name not in cases:
            cases[name] = _table(name, "", *LATENCY_COLUMNS)
        cases[name].add_row(*cells)
    gathers = 100 * latency.gather_scatter_share
    operators = _table(f"Operators while decoding ({gathers:.1f} % Gather and Scatter)", "operator", "ms", "share")
    for entry in latency.operators:
        operators.add_row(entry.operator, f"{entry.milliseconds:.3f}", f"{100 * entry.share:.1f} %")
    return [title, *cases.values(), operators]


def _table(title: str, first: str, *figures: str) -> Table:
    """Narrow enough for 80 columns with all figures of a case."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first)
    for name in figures:
        table.add_column(name, justify="right")
    return table
