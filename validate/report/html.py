"""A report as one page that needs nothing else: no script, no font, no file; readable in light and in dark."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from dispc.validate.report.report import LATENCY_COLUMNS, figure_and_limit, latency_cells

WIDTH, PLOT_HEIGHT = 720, 180
"""User units of a chart; it is drawn as wide as the page."""
STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --panel: #f5f6f8; --text: #1c2026; --quiet: #5c6570; --line: #d5d9df;
  --ours: #1f6fd0; --theirs: #9a6b00; --good: #1a7f43; --bad: #c62f2f; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --panel: #1d2128; --text: #e6e9ee; --quiet: #9aa4b0;
  --line: #363d47; --ours: #6fb0ff; --theirs: #e0b050; --good: #58c983; --bad: #ff7b74; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 24px 20px 60px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 24px; line-height: 1.3; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 8px; }
.verdict { border-left: 6px solid var(--mark); padding: 4px 0 4px 14px; margin-bottom: 16px; }
.verdict b { color: var(--mark); } .passed { --mark: var(--good); } .failed { --mark: var(--bad); }
.skipped, .noted { --mark: var(--quiet); } .quiet { color: var(--quiet); }
.drill { background: var(--panel); border-radius: 6px; padding: 10px 14px; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--quiet); font-weight: 600; } .number { text-align: right; white-space: nowrap; }
td.status { color: var(--mark); font-weight: 600; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; } dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; margin: 8px 0; } svg text { fill: var(--quiet); font-size: 11px; }
.ours { fill: var(--ours); } .theirs { fill: var(--theirs); } .bad { fill: var(--bad); }
path.ours { fill: none; stroke: var(--ours); stroke-width: 2; }
path.theirs { fill: none; stroke: var(--theirs); stroke-width: 2; stroke-dasharray: 5 4; }
line { stroke: var(--line); } .key { display: inline-block; width: 12px; height: 12px; border-radius: 3px;
  margin: 0 6px 0 14px; vertical-align: -1px; } .key.ours { background: var(--ours); margin-left: 0; }
.key.theirs { background: var(--theirs); }
"""


def page(report: dict[str, Any]) -> str:
    """The HTML of a report, given as `Report.as_dict()`."""
    sections = (_verdict, _checks, _facts, _blocks, _widths, _latency, _operators)
    body = "\n".join(part for section in sections if (part := section(report)))
    title = f"dispc validate: {'passed' if report['passed'] else 'FAILED'}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _verdict(report: dict[str, Any]) -> str:
    word = "passed" if report["passed"] else "failed"
    drill = (report["drill"] or {}).get("verdict")
    where = f'<p class="drill"><b>Where it broke:</b> {escape(drill)}</p>' if drill else ""
    rest = report["headline"].split(", ", 1)[1]
    return (
        f'<div class="verdict {word}"><h1>Validation <b>{word.upper()}</b></h1><div>{escape(rest)}</div></div>{where}'
    )


def _checks(report: dict[str, Any]) -> str:
    rows = []
    for check in report["checks"]:
        figure, limit = (escape(cell) for cell in figure_and_limit(check))
        rows.append(
            f'<tr class="{check["status"]}"><td class="status">{check["status"]}</td><td>{escape(check["name"])}</td>'
            f'<td class="number">{figure}</td><td class="number">{limit}</td>'
            f'<td class="quiet">{escape(check["detail"])}</td></tr>'
        )
    head = '<tr><th></th><th>check</th><th class="number">figure</th><th class="number">limit</th><th>over</th></tr>'
    return f'<h2>Checks</h2><div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _facts(report: dict[str, Any]) -> str:
    facts = {
        name: report[name] for name in ("artifact", "reference", "target", "dtype", "padding", "lowering", "device")
    }
    facts["bytes"] = f"{report['bytes']:,}"
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(fact))}</dd>" for name, fact in facts.items())
    return f"<h2>What was compared</h2><dl>{entries}</dl>"


def _blocks(report: dict[str, Any]) -> str:
    """Error of the residual stream behind each sub-layer, over what the dtype costs, on a scale of powers of ten."""
    drill = report["drill"]
    if not drill or not drill["stages"]:
        return ""
    stages, limit = drill["stages"], drill["limit"]
    ratios = [stage["ratio"] for stage in stages]
    known = [ratio for ratio in ratios if ratio]
    top = math.ceil(math.log10(max([limit * 1.5, *known])))
    bottom = min(-1, math.floor(math.log10(min([*known, 1]))))

    def height(ratio: float | None) -> float:
        if ratio is None:  # not a finite number
            return 1.0
        return min(max((math.log10(max(ratio, 10.0**bottom)) - bottom) / (top - bottom), 0.0), 1.0)

    bars = [(height(ratio), "ours" if ratio is not None and ratio <= limit else "bad") for ratio in ratios]
    titles = [f"{s['name']}: {'inf' if s['ratio'] is None else format(s['ratio'], '.3g')} x own error" for s in stages]
    ticks = [(height(10.0**power), f"1e{power}") for power in range(bottom, top + 1)]
    names, mark = [stage["name"] for stage in stages], (height(limit), f"limit {limit:g}")
    chart = _bar_chart(bars, titles, ticks, names, mark=mark)
    return (
        f"<h2>Error per block</h2><p class='quiet'>Residual stream behind each sub-layer in units of what "
        f"{escape(report['dtype'])} costs by itself; scenario: {escape(drill['scenario'])}.</p>{chart}"
    )


def _widths(report: dict[str, Any]) -> str:
    parts = []
    for name, full in report["full_widths"].items():
        sizes = [row[name] for row in report["widths"]]
        titles = [f"block {block}: {size} of {full}" for block, size in enumerate(sizes)]
        names = [str(block) for block in range(len(sizes))]
        ticks = [(0.0, "0"), (0.5, f"{full // 2}"), (1.0, f"{full}")]
        chart = _bar_chart([(size / full, "ours") for size in sizes], titles, ticks, names, height=90)
        mean = 100 * sum(sizes) / (len(sizes) * full)
        parts.append(f"<div><b>{escape(name)}</b> <span class='quiet'>{mean:.1f} % kept</span>{chart}</div>")
    return f"<h2>Widths per block</h2>{''.join(parts)}"


def _latency(report: dict[str, Any]) -> str:
    latency = report["latency"]
    if not latency:
        return ""
    rows = []
    for row in latency["rows"]:
        name, which, *figures = latency_cells(row, latency)
        cells = "".join(f'<td class="number">{figure}</td>' for figure in figures)
        rows.append(f"<tr><td>{escape(name)}</td><td>{which}</td>{cells}</tr>")
    head = "<tr><th></th><th></th>" + "".join(f'<th class="number">{name}</th>' for name in LATENCY_COLUMNS) + "</tr>"
    bars = [
        (
            row["name"] if row["artifact"] == "artifact" else "",
            row["p50"],
            "ours" if row["artifact"] == "artifact" else "theirs",
        )
        for row in latency["rows"]
    ]
    chart = _horizontal(bars, lambda value: f"{value:.2f} ms")
    facts = f"{latency['provider']}, {latency['threads']} threads (chosen by {latency['threads_chosen_by']}), "
    facts += f"{latency['rounds']} runs behind {latency['warmup']} others"
    if latency["peak_bytes"]:
        facts += f", peak memory {latency['peak_bytes'] / 2**20:,.0f} MiB"
    key = '<span class="key ours"></span>artifact' + (
        '<span class="key theirs"></span>dense' if latency["dense"] else ""
    )
    return (
        f'<h2>Latency</h2><p class="quiet">{escape(facts)}</p><p>{key}</p>{chart}'
        f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'
    )


def _operators(report: dict[str, Any]) -> str:
    latency = report["latency"]
    if not latency:
        return ""
    bars = [(entry["operator"], entry["milliseconds"], "ours") for entry in latency["operators"]]
    share = 100 * latency["gather_scatter_share"]
    chart = _horizontal(bars, lambda value: f"{value:.3f} ms")
    return f'<h2>Operators while decoding</h2><p class="quiet">{share:.1f} % in Gather and Scatter.</p>{chart}'


def _bar_chart(
    bars: Sequence[tuple[float, str]],
    titles: Sequence[str],
    ticks: Iterable[tuple[float, str]],
    names: Sequence[str],
    *,
    height: int = PLOT_HEIGHT,
    mark: tuple[float, str] | None = None,
) -> str:
    """Upright bars: (height as a share, class) each. `mark` is a line across, with its name."""
    left, right, top, bottom = 44, 8, 8, 20
    inner, step = height - top - bottom, (WIDTH - left - right) / max(len(bars), 1)
    parts = []
    for share, name in ticks:
        y = top + inner * (1 - share)
        parts.append(f'<line x1="{left}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
    for number, ((share, kind), title) in enumerate(zip(bars, titles, strict=True)):
        x, tall = left + step * number + step * 0.12, max(inner * share, 0.5)
        parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{top + inner - tall:.1f}" width="{step * 0.76:.1f}" '
            f'height="{tall:.1f}"><title>{escape(title)}</title></rect>'
        )
    every = max(1, math.ceil(len(names) * max(map(len, names)) * 7 / (WIDTH - left - right)))
    for number in range(0, len(names), every):
        x = left + step * (number + 0.5)
        parts.append(f'<text x="{x:.1f}" y="{height - 5}" text-anchor="middle">{escape(names[number])}</text>')
    if mark:
        y = top + inner * (1 - mark[0])
        parts.append(f'<path class="theirs" d="M{left} {y:.1f}H{WIDTH - right}"/>')
        parts.append(f'<text x="{WIDTH - right}" y="{y - 4:.1f}" text-anchor="end">{escape(mark[1])}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def _horizontal(bars: Sequence[tuple[str, float, str]], spell: Callable[[float], str]) -> str:
    """Lying bars: (name, value, class) each, with the value behind the bar."""
    left, right, tall = 240, 80, 20
    largest = max((value for _, value, _ in bars), default=0) or 1
    parts = []
    for number, (name, value, kind) in enumerate(bars):
        y, wide = number * tall, max((WIDTH - left - right) * value / largest, 0.5)
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect class="{kind}" x="{left}" y="{y + 3}" width="{wide:.1f}" height="{tall - 6}"/>')
        parts.append(f'<text x="{left + wide + 6:.1f}" y="{y + 14}">{escape(spell(value))}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {max(len(bars), 1) * tall}" role="img">{"".join(parts)}</svg>'
