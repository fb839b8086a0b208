"""docs/tradeoff.md and its picture, from what tradeoff.py and learn_and_recover.py measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pages
from pages import table

WINDOWS = "16 of 1024"
GPU_WINDOWS = "wiki.test, 16 of 1024"
COLORS = {"float32": "tab:blue", "int8": "tab:orange", "int4": "tab:green", "GPTQ int4": "tab:red"}
MIXED = " GPTQ int4 keeps the value and down projections of some blocks in 8 bits (`--mixed widths`)."
AXES = (("milliseconds", "milliseconds per token"), ("megabytes", "megabytes (model.onnx and weights)"))


def write_tradeoff(known: Mapping[str, Any], recovery: Mapping[str, Any], docs: Path) -> None:
    """Write both files."""
    rows = complete(known["points"], recovery)
    draw(rows, docs / "tradeoff.png")
    (docs / "tradeoff.md").write_text(page(rows, known, recovery), encoding="utf-8")


def complete(points: Mapping[str, Mapping[str, Any]], recovery: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points that have a perplexity; that of float32 points is their reference's."""
    rows = []
    for name, facts in points.items():
        found = facts.get("perplexity", {}).get(WINDOWS) or reference(facts, recovery, GPU_WINDOWS)
        if found is None:
            continue
        row = dict(facts) | {"name": name, "perplexity": found, "megabytes": facts["bytes"] / 1e6}
        row["whole"] = facts.get("perplexity", {}).get("whole of 2048") or reference(facts, recovery, "wiki.test")
        rows.append(row)
    return rows


def reference(facts: Mapping[str, Any], recovery: Mapping[str, Any], text: str) -> float | None:
    """The perplexity of a float32 point's reference; None for other formats, or where it was not measured."""
    if facts["format"] != "float32":
        return None
    key = f"{'lora' if facts['recovered'] else 'pruned'} {facts['ratio']}" if facts["ratio"] else "dense"
    found: float | None = recovery.get(key, {}).get(text)
    return found


def frontier(rows: Sequence[Mapping[str, Any]], axis: str) -> list[Mapping[str, Any]]:
    """The Pareto frontier of perplexity and an axis, from the smallest (fastest) on.

    Rows without a figure on the axis (graphs that were not timed) are left out.
    """
    best, found = float("inf"), []
    for row in sorted((row for row in rows if axis in row), key=lambda row: (row[axis], row["perplexity"])):
        if row["perplexity"] < best:
            best = row["perplexity"]
            found.append(row)
    return found


def title(row: Mapping[str, Any]) -> str:
    """The title of a row."""
    kind = f"{row['ratio']} % pruned" + (", recovered" if row["recovered"] else "") if row["ratio"] else "dense"
    return f"{kind}, {row['format']}" + (" (builder)" if row["compiler"] == "builder" else "")


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Perplexity against time and against size, with both frontiers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    for (axis, label), plot in zip(AXES, axes, strict=True):
        for row in (row for row in rows if axis in row):
            marker = "s" if row["compiler"] == "builder" else "o" if row["ratio"] else "D"
            filled = COLORS[row["format"]] if row["recovered"] or not row["ratio"] else "none"
            plot.scatter(row[axis], row["perplexity"], marker=marker, s=45, color=COLORS[row["format"]], fc=filled)
            if row["ratio"]:
                at = (row[axis], row["perplexity"])
                plot.annotate(f"{row['ratio']}", at, (5, 4), textcoords="offset points", fontsize=8)
        line = frontier(rows, axis)
        plot.plot([r[axis] for r in line], [r["perplexity"] for r in line], color="gray", linewidth=0.8, zorder=0)
        plot.set(xlabel=label)
    axes[0].set(ylabel="perplexity, WikiText-2 test (16 windows of 1,024)")
    for name, color in COLORS.items():
        if any(row["format"] == name for row in rows):
            axes[1].scatter([], [], color=color, label=name)
    for marker, name in (
        ("D", "dense"),
        ("o", "pruned, per cent beside it"),
        ("s", "onnxruntime-genai's builder, dense"),
    ):
        axes[1].scatter([], [], color="gray", marker=marker, label=name)
    axes[1].legend(fontsize="small")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def page(rows: Sequence[Mapping[str, Any]], known: Mapping[str, Any], recovery: Mapping[str, Any]) -> str:
    """The Markdown of docs/tradeoff.md."""
    timed = ": sizes; the graphs have not been timed on a quiet machine yet"
    if "environment" in known:
        timed = (
            f" on {known['environment']['cpu']}, {known['threads']} threads: one token after {known['past']}, medians "
            f"of {known['round_count']} rounds in which all graphs take turns"
        )
    fronts = {axis: {row["name"] for row in frontier(rows, axis)} for axis, _ in AXES}
    shown = [table_row(row, fronts) for row in sorted(rows, key=lambda row: row["megabytes"])]
    answers = [f"{recovery['dense']['answers']:.2f} (dense)"]
    for ratio in (20, 30, 40, 50):
        recovered = recovery.get(f"lora {ratio}", {})
        answers += [f"{recovered['answers']:.2f} ({ratio} %)"] if "answers" in recovered else []
    blocks = [
        "# What pruning buys",
        "Written by `benchmarks/tradeoff.py page`, not by hand.",
        "![perplexity against time and size](tradeoff.png)",
        f"SmolLM2-135M-Instruct{timed}. Perplexity on "
        "WikiText-2 test, the first 16 windows of 1,024 tokens, and all 148 of 2,048 where it was measured; of float32 "
        "artifacts it is their reference's, measured on a GPU, of the others their own. The grey line joins those that "
        "no other is both smaller (faster) and better than."
        + (MIXED if any(row["format"] == "GPTQ int4" for row in rows) else ""),
        table(("model", "perplexity", "whole test split", "ms a token", "MB", "on the frontier of"), shown),
        *verdicts(rows),
        "The recovered models were trained on WikiText-2's train split for half a million tokens, the dense model was "
        "not: part of their advantage is that. On 48 held-out answers of the dense model, where the advantage is its, "
        f"perplexities in float32 are {', '.join(answers)}.",
        *([known["remark"]] if "remark" in known else []),
        "## Commands",
        "Models: `dispc recover` (docs/recovery.md).",
        "\n".join(f"- `{command}`" for command in sorted({row["command"] for row in rows})),
    ]
    return pages.page(blocks)


def table_row(row: Mapping[str, Any], fronts: Mapping[str, set[str]]) -> tuple[str, ...]:
    """A row of the table; `fronts` has the names on each frontier."""
    names = {"milliseconds": "time", "megabytes": "size"}
    return (
        title(row),
        f"{row['perplexity']:.2f}",
        f"{row['whole']:.2f}" if row["whole"] else "",
        f"{row['milliseconds']:.2f}" if "milliseconds" in row else "",
        f"{row['megabytes']:.0f}",
        ", ".join(names[axis] for axis in names if row["name"] in fronts[axis]),
    )


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on where pruned artifacts win and where they do not."""
    dense, pruned = ([row for row in rows if bool(row["ratio"]) == kind] for kind in (False, True))
    found = []
    for axis, what, of in (("milliseconds", "fast", "time"), ("megabytes", "small", "size")):
        here = [row for row in pruned if axis in row]
        if not here:
            continue
        wins = [row for row in here if better_than_rivals(row, dense, axis)]
        line = frontier(rows, axis)
        share = sum(1 for row in line if row["ratio"])
        better = f"Better than every dense one that is as {what}: {'; '.join(map(title, wins))}."
        none = f"No pruned artifact is better than every dense one that is as {what}."
        found += [f"Of the {len(line)} on the frontier of {of} {share} are pruned. {better if wins else none}"]
    return found


def better_than_rivals(row: Mapping[str, Any], dense: Sequence[Mapping[str, Any]], axis: str) -> bool:
    """Whether there are dense rows that are at least as small (fast), and all of them have a worse perplexity."""
    rivals = [other for other in dense if axis in other and other[axis] <= row[axis]]
    return bool(rivals) and all(row["perplexity"] < other["perplexity"] for other in rivals)
