"""docs/results.md, from the cells of learned_masks.py."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pages
from common import console
from machine import REPOSITORY
from pages import table
from recovery_page import recovery_sections

PAGE = REPOSITORY / "docs" / "results.md"
RECOVERY = REPOSITORY / "benchmarks" / "results" / "recovery.json"
ZERO_SHOT = REPOSITORY / "benchmarks" / "results" / "zero_shot.json"
"""Of the dense and of a recovered artifact, by `dispc eval` (the command is in the file)."""
TEXT = "python benchmarks/learning_text.py wiki.train.tokens wiki.valid.raw -o wikitext-mixed.txt"
Cell = dict[str, Any]


def write_page(cells: Sequence[Cell], methods: Sequence[str], page: Path = PAGE, recovery: Path | None = None) -> None:
    """Write the page: a table per protocol of perplexity, the zero-shot tasks, and the command of each cell."""
    cells = sorted(cells, key=lambda cell: ([*methods, "dense"].index(cell["method"]), cell["ratio"], cell["seed"]))
    blocks = ["# Results", "Written by `benchmarks/learned_masks.py table`, not by hand."]
    if recovery is not None:
        blocks += recovery_sections(json.loads(recovery.read_text()), learned_short(cells), page.parent)
        if ZERO_SHOT.exists():
            measured = json.loads(ZERO_SHOT.read_text())["rows"]
            blocks += accuracies([(row["title"], row) for row in measured], "## Zero-shot accuracy after recovery")
        blocks += ["# Methods and ablations, from 307,200 tokens"]
    blocks += [
        f"`wikitext-mixed.txt` is what `{TEXT}` makes of WikiText-2's train and validation splits. Cells are "
        "METHOD-RATIO-SEED.json in `benchmarks/results/learned/`, with their masks and the machines they were "
        "measured on."
    ]
    protocols = {protocol(text) for cell in cells for text in cell["perplexities"]}
    for chosen in sorted(protocols, key=lambda chosen: (chosen.windows, chosen)):
        blocks += perplexities(cells, methods, chosen)
    blocks += zero_shot(cells) + commands(cells)
    page.write_text(pages.page(blocks), encoding="utf-8")
    console.print(f"{page}: {len(cells)} cells", highlight=False)


def learned_short(cells: Iterable[Cell]) -> dict[int, float]:
    """Whole-split perplexities of the full method by ratio."""
    return {
        cell["ratio"]: text["perplexity"]
        for cell in cells
        if (cell["method"], cell["seed"]) == ("DISP-LLM", 0)
        for text in cell["perplexities"]
        if protocol(text).length == 2048
    }


class Protocol(NamedTuple):
    """How a perplexity was measured; `only` tells that the text has more windows than were read."""

    data: str
    windows: int
    length: int
    only: bool

    @property
    def title(self) -> str:
        return f"{self.data}, {'the first ' if self.only else 'all '}{self.windows} windows of {self.length:,} tokens"

    @property
    def options(self) -> str:
        limit = f" --max-windows {self.windows}" if self.only else ""
        return f"--data {self.data} --sequence-length {self.length}{limit}"


def protocol(text: Cell) -> Protocol:
    return Protocol(text["data"], text["windows"], text["sequence_length"], text.get("max_windows") is not None)


def judged(options: str, runtimes: Iterable[str]) -> str:
    """The command that measured, and in which runtimes: both give the same figures."""
    where = {"torch": "the torch reference", "onnxruntime": "the artifact that `dispc compile` makes, in ONNX Runtime"}
    on = ", or ".join(where[name] for name in sorted(set(runtimes), reverse=True))
    return f"`dispc eval MODEL --masks CELL.safetensors {options}`; judged was {on}."


def perplexities(cells: Sequence[Cell], methods: Sequence[str], chosen: Protocol) -> list[str]:
    """A table of methods by ratio, and the figures of other seeds."""
    texts = [(cell, text) for cell in cells for text in cell["perplexities"] if protocol(text) == chosen]
    found = {(cell["method"], cell["ratio"], cell["seed"]): text["perplexity"] for cell, text in texts}
    ratios = sorted({ratio for _, ratio, _ in found} - {0})
    blocks = [
        f"## Perplexity on {chosen.title}",
        judged(chosen.options, [text.get("runtime", "torch") for _, text in texts]),
    ]
    if dense := found.get(("dense", 0, 0)):
        blocks.append(f"The dense model: {dense:.2f}.")
    rows = [(method, *(figure(found, (method, ratio, 0)) for ratio in ratios)) for method in methods]
    blocks.append(table(("method", *(f"{ratio} %" for ratio in ratios)), rows))
    for method in methods:
        for ratio in ratios:
            seeds = {s: value for (m, r, s), value in sorted(found.items()) if (m, r) == (method, ratio) and value}
            if len(seeds) > 1:
                values = list(seeds.values())
                shown = ", ".join(f"{value:.2f} (seed {seed})" for seed, value in seeds.items())
                spread = f"mean {statistics.mean(values):.2f}, standard deviation {statistics.stdev(values):.2f}"
                blocks.append(f"{method} at {ratio} %: {shown}; {spread}.")
    return blocks


def zero_shot(cells: Iterable[Cell]) -> list[str]:
    """A table of accuracies for each set of tasks and limit that was measured."""
    groups: dict[tuple[Any, ...], list[tuple[str, Cell]]] = {}
    for cell in cells:
        title = cell["method"] if not cell["ratio"] else f"{cell['method']}, {cell['ratio']} %"
        for measured in cell["zero_shot"]:
            items = (facts["items"] for facts in measured["tasks"].values())
            groups.setdefault((*measured["names"], *items, measured["limit"]), []).append((title, measured))
    return [block for measured in groups.values() for block in accuracies(measured)]


def accuracies(rows: Sequence[tuple[str, Cell]], heading: str = "## Zero-shot accuracy") -> list[str]:
    """One table: a row per model; the standard error of the mean follows from those of the tasks."""
    first = rows[0][1]
    names, limit, facts = first["names"], first["limit"], first["tasks"]
    items = ", ".join(f"{name} {facts[name]['items']}" for name in names)
    options = f"--tasks {','.join(names)} --include TASKS{f' --limit {limit}' if limit else ''}"
    shown = []
    for title, measured in rows:
        values = [(measured["tasks"][name]["value"], measured["tasks"][name]["stderr"]) for name in names]
        mean = statistics.mean(value for value, _ in values), math.hypot(*(error for _, error in values)) / len(values)
        shown.append((title, *(f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in (*values, mean))))
    heads = [f"{name.removeprefix('local_')} ({facts[name]['metric']})" for name in names]
    return [
        heading,
        judged(options, (measured["runtime"] for _, measured in rows)),
        "TASKS is what `benchmarks/zero_shot_tasks.py` makes. Per cent, with the standard error. The texts were partly "
        "preprocessed by those who published the files: figures compare with each other, not with other tables; a "
        "difference below twice its error says nothing. "
        f"Items{', the first of each task' if limit else ''}: {items}.",
        table(("model", *heads, "mean"), shown),
    ]


def commands(cells: Iterable[Cell]) -> list[str]:
    """How each cell was made."""
    rows = [
        (
            f"{cell['method']}, {cell['ratio']} %, seed {cell['seed']}",
            f"{cell['tokens']:,}",
            f"{cell['learn_seconds'] / 60:.0f}" if "learn_seconds" in cell else "",
            f"`{cell['command']}`",
        )
        for cell in cells
        if cell.get("command")
    ]
    return [
        "## How each cell was made",
        "Minutes are those of the steps, on two cores that other work shared.",
        table(("cell", "tokens", "minutes", "command"), rows),
    ]


def figure(found: Mapping[tuple[str, int, int], float | None], cell: tuple[str, int, int]) -> str:
    if cell not in found:
        return "not run"
    value = found[cell]  # JSON has null for what is infinite
    return "infinite" if value is None else f"{value:,.2f}" if value < 1e5 else f"{value:.1e}"
