"""A report as one page: what is drawn is worked out here, how it looks is in page.html.jinja."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader

from dispc.runtime.latency import Latency
from dispc.validate.report.report import LATENCY_COLUMNS, Report, figure_and_limit, latency_cells

WIDTH, PLOT_HEIGHT = 720, 180
"""User units of a chart; it is drawn as wide as the page."""


@dataclass(frozen=True)
class Bar:
    kind: str
    x: float
    y: float
    width: float
    height: float
    title: str = ""


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    anchor: str = ""


@dataclass(frozen=True)
class Line:
    left: float
    right: float
    y: float


@dataclass(frozen=True)
class Chart:
    """Shapes in user units, from the top left corner."""

    height: float
    bars: Sequence[Bar]
    labels: Sequence[Label]
    lines: Sequence[Line] = ()
    mark: Line | None = None
    width: float = WIDTH


def page(report: Report) -> str:
    """The HTML of a report; it needs no other file, and runs no script."""
    templates = Environment(loader=PackageLoader("dispc.validate.report", "."), autoescape=True)
    latency = report.latency
    names = ("artifact", "reference", "target", "dtype", "padding", "lowering", "device")
    facts = {name: getattr(report, name) for name in names}
    facts["bytes"] = f"{report.bytes:,}"
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return templates.get_template("page.html.jinja").render(
        report=report,
        judged_on=report.headline.split(", ", 1)[1],
        figure_and_limit=figure_and_limit,
        facts=facts,
        blocks=_blocks(report),
        widths=list(_widths(report)),
        timing=_timing(latency) if latency else "",
        latency=_latency(latency) if latency else None,
        columns=LATENCY_COLUMNS,
        rows=[latency_cells(row, latency) for row in latency.rows] if latency else [],
        operators=_operators(latency) if latency else None,
    )


def _blocks(report: Report) -> Chart | None:
    """Error of the residual stream after each sub-layer, over what the dtype costs, on a scale of powers of ten."""
    drill = report.drill
    if not drill or not drill.stages:
        return None
    stages, limit = drill.stages, drill.limit
    ratios = [stage.ratio for stage in stages]
    known = [ratio for ratio in ratios if ratio and math.isfinite(ratio)]
    top = math.ceil(math.log10(max([limit * 1.5, *known])))
    bottom = min(-1, math.floor(math.log10(min([*known, 1]))))

    def height(ratio: float) -> float:
        if not math.isfinite(ratio):
            return 1.0
        return min(max((math.log10(max(ratio, 10.0**bottom)) - bottom) / (top - bottom), 0.0), 1.0)

    bars = [(height(ratio), "ours" if ratio <= limit else "bad") for ratio in ratios]
    titles = [f"{s.name}: {s.ratio if math.isfinite(s.ratio) else math.inf:.3g} x own error" for s in stages]
    ticks = [(height(10.0**power), f"1e{power}") for power in range(bottom, top + 1)]
    names, mark = [stage.name for stage in stages], (height(limit), f"limit {limit:g}")
    return _upright(bars, titles, ticks, names, mark=mark)


def _widths(report: Report) -> Iterable[tuple[str, float, Chart]]:
    """Of every set: its name, the percentage kept over all blocks, and the widths block by block."""
    for name, full in report.full_widths.items():
        sizes = [row[name] for row in report.widths]
        titles = [f"block {block}: {size} of {full}" for block, size in enumerate(sizes)]
        names = [str(block) for block in range(len(sizes))]
        ticks = [(0.0, "0"), (0.5, f"{full // 2}"), (1.0, f"{full}")]
        chart = _upright([(size / full, "ours") for size in sizes], titles, ticks, names, height=90)
        yield name, 100 * sum(sizes) / (len(sizes) * full), chart


def _timing(latency: Latency) -> str:
    facts = f"{latency.provider}, {latency.threads} threads (chosen by {latency.threads_chosen_by}), "
    facts += f"{latency.rounds} runs after {latency.warmup} others"
    if latency.peak_bytes:
        facts += f", peak memory {latency.peak_bytes / 2**20:,.0f} MiB"
    return facts


def _latency(latency: Latency) -> Chart:
    own = [(row, row.artifact == "artifact") for row in latency.rows]
    bars = [(row.name if ours else "", row.p50, "ours" if ours else "theirs") for row, ours in own]
    return _lying(bars, lambda value: f"{value:.2f} ms")


def _operators(latency: Latency) -> Chart:
    bars = [(entry.operator, entry.milliseconds, "ours") for entry in latency.operators]
    return _lying(bars, lambda value: f"{value:.3f} ms")


def _upright(
    bars: Sequence[tuple[float, str]],
    titles: Sequence[str],
    ticks: Iterable[tuple[float, str]],
    names: Sequence[str],
    *,
    height: int = PLOT_HEIGHT,
    mark: tuple[float, str] | None = None,
) -> Chart:
    """Upright bars: (height as a share, class) each. `mark` is a line across, with its name."""
    left, right, top, bottom = 44, 8, 8, 20
    inner, step, end = height - top - bottom, (WIDTH - left - right) / max(len(bars), 1), WIDTH - right
    lines, labels, drawn = [], [], []
    for share, name in ticks:
        y = top + inner * (1 - share)
        lines.append(Line(left, end, round(y, 1)))
        labels.append(Label(left - 6, round(y + 4, 1), name, "end"))
    for number, ((share, kind), title) in enumerate(zip(bars, titles, strict=True)):
        x, tall = left + step * number + step * 0.12, max(inner * share, 0.5)
        y = top + inner - tall
        drawn.append(Bar(kind, round(x, 1), round(y, 1), round(step * 0.76, 1), round(tall, 1), title))
    every = max(1, math.ceil(len(names) * max(map(len, names)) * 7 / (WIDTH - left - right)))
    labels += [
        Label(round(left + step * (number + 0.5), 1), height - 5, names[number], "middle")
        for number in range(0, len(names), every)
    ]
    across = None
    if mark:
        y = top + inner * (1 - mark[0])
        across = Line(left, end, round(y, 1))
        labels.append(Label(end, round(y - 4, 1), mark[1], "end"))
    return Chart(height, drawn, labels, lines, across)


def _lying(bars: Sequence[tuple[str, float, str]], spell: Callable[[float], str]) -> Chart:
    """Lying bars: (name, value, class) each, with the value after the bar."""
    left, right, tall = 240, 80, 20
    largest = max((value for _, value, _ in bars), default=0) or 1
    drawn, labels = [], []
    for number, (name, value, kind) in enumerate(bars):
        y, wide = number * tall, round(max((WIDTH - left - right) * value / largest, 0.5), 1)
        drawn.append(Bar(kind, left, y + 3, wide, tall - 6))
        labels += [Label(left - 8, y + 14, name, "end"), Label(round(left + wide + 6, 1), y + 14, spell(value))]
    return Chart(max(len(bars), 1) * tall, drawn, labels)
