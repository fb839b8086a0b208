"""docs/results.md, from the cells of learned_masks.py."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import console
from machine import REPOSITORY

PAGE = REPOSITORY / "docs" / "results.md"
Cell = dict[str, Any]


def write_page(cells: Sequence[Cell], methods: Sequence[str], page: Path = PAGE) -> None:
    """A table for each way in which perplexity was measured, the zero-shot tasks, and how to repeat each cell."""
    cells = sorted(cells, key=lambda cell: ([*methods, "dense"].index(cell["method"]), cell["ratio"], cell["seed"]))
    lines = [
        "# Results", "",
        "Written by `benchmarks/learned_masks.py table`, not by hand. `wikitext-mixed.txt` is what "
        "`benchmarks/learning_text.py` makes of WikiText-2's train and validation splits. Each cell's file in "
        "`benchmarks/results/learned/` says what was judged: the torch reference or the artifact in ONNX Runtime.", "",
    ]  # fmt: skip
    protocols = {protocol(text) for cell in cells for text in cell["perplexities"]}
    for chosen in sorted(protocols):
        lines += perplexities(cells, methods, chosen)
    lines += zero_shot(cells) + commands(cells)
    page.write_text("\n".join(lines), encoding="utf-8")
    console.print(f"{page}: {len(cells)} cells", highlight=False)


def protocol(text: Cell) -> tuple[str, int, int]:
    return text["data"], text["windows"], text["sequence_length"]


def perplexities(cells: Sequence[Cell], methods: Sequence[str], chosen: tuple[str, int, int]) -> list[str]:
    """The methods by ratio, and below them what other seeds gave."""
    found = {(cell["method"], cell["ratio"], cell["seed"]): text["perplexity"]
             for cell in cells for text in cell["perplexities"] if protocol(text) == chosen}  # fmt: skip
    ratios = sorted({ratio for _, ratio, _ in found} - {0})
    data, windows, length = chosen
    dense = found.get(("dense", 0, 0))
    lines = [
        f"## Perplexity on {data}, {windows} windows of {length} tokens", "",
        *([f"The dense model: {dense:.2f}.", ""] if dense else []),
        *table(("method", *(f"{ratio} %" for ratio in ratios)), [
            (method, *(figure(found.get((method, ratio, 0))) for ratio in ratios)) for method in methods
        ]),
    ]  # fmt: skip
    for method in methods:
        for ratio in ratios:
            seeds = {seed: value for (m, r, seed), value in sorted(found.items()) if (m, r) == (method, ratio)}
            if len(seeds) > 1:
                values = list(seeds.values())
                shown = ", ".join(f"{value:.2f} (seed {seed})" for seed, value in seeds.items())
                spread = f"mean {statistics.mean(values):.2f}, standard deviation {statistics.stdev(values):.2f}"
                lines += [f"{method} at {ratio} %: {shown}; {spread}.", ""]
    return lines


def zero_shot(cells: Iterable[Cell]) -> list[str]:
    """Accuracy by task, a table for each way in which it was measured; nothing where no task was."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        if "tasks" in cell:
            items = (f"{name} {facts['items']}" for name, facts in cell["tasks"].items())
            groups.setdefault(tuple(items), []).append(cell)
    return [line for items, measured in groups.items() for line in accuracies(measured, ", ".join(items))]


def accuracies(measured: Sequence[Cell], items: str) -> list[str]:
    names = list(measured[0]["tasks"])
    rows = []
    for cell in measured:
        values = [cell["tasks"][name]["value"] for name in names]
        title = cell["method"] if not cell["ratio"] else f"{cell['method']}, {cell['ratio']} %"
        shown = [f"{100 * cell['tasks'][n]['value']:.1f} ± {100 * cell['tasks'][n]['stderr']:.1f}" for n in names]
        rows.append((title, *shown, f"{100 * statistics.mean(values):.1f}"))
    heads = [f"{name.removeprefix('local_')} ({measured[0]['tasks'][name]['metric']})" for name in names]
    return [
        "## Zero-shot accuracy", "",
        "Per cent, with the standard error. The texts were partly preprocessed by those who published the files: "
        f"figures compare with each other, not with other tables. Items: {items}.", "",
        *table(("model", *heads, "mean"), rows),
    ]  # fmt: skip


def commands(cells: Iterable[Cell]) -> list[str]:
    """How each cell was made. Minutes are those of the steps, on two shared cores that did other things as well."""
    rows = [
        (
            f"{cell['method']}, {cell['ratio']} %, seed {cell['seed']}", f"{cell['tokens']:,}",
            f"{cell['learn_seconds'] / 60:.0f}" if "learn_seconds" in cell else "", f"`{cell['command']}`",
        )
        for cell in cells if cell.get("command")
    ]  # fmt: skip
    return [
        "## How each cell was made", "",
        "Minutes are those of the steps, on two cores that other work shared.", "",
        *table(("cell", "tokens", "minutes", "command"), rows),
    ]  # fmt: skip


def figure(value: float | None) -> str:
    return "not run" if value is None else f"{value:,.2f}" if value < 1e5 else f"{value:.1e}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]
