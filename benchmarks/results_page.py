"""docs/results.md, from the cells of learned_masks.py."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import console
from machine import REPOSITORY
from recovery_page import recovery_sections

PAGE = REPOSITORY / "docs" / "results.md"
RECOVERY = REPOSITORY / "benchmarks" / "results" / "recovery.json"
ZERO_SHOT = REPOSITORY / "benchmarks" / "results" / "zero_shot.json"
"""Of the dense and of a recovered artifact, by `dispc eval` (the command is in the file)."""
TEXT = "python benchmarks/learning_text.py wiki.train.tokens wiki.valid.raw -o wikitext-mixed.txt"
Cell = dict[str, Any]


def write_page(cells: Sequence[Cell], methods: Sequence[str], page: Path = PAGE, recovery: Path | None = None) -> None:
    """A table for each way in which perplexity was measured, the zero-shot tasks, and how to repeat each cell."""
    cells = sorted(cells, key=lambda cell: ([*methods, "dense"].index(cell["method"]), cell["ratio"], cell["seed"]))
    lines = [
        "# Results", "",
        "Written by `benchmarks/learned_masks.py table`, not by hand.", "",
    ]  # fmt: skip
    how = [
        "`wikitext-mixed.txt` is what "
        f"`{TEXT}` makes of WikiText-2's train and validation splits. Cells are "
        "METHOD-RATIO-SEED.json in `benchmarks/results/learned/`, with their masks and the machines they were "
        "measured on.", "",
    ]  # fmt: skip
    if recovery is not None:
        lines += recovery_sections(json.loads(recovery.read_text()), learned_short(cells), page.parent)
        if ZERO_SHOT.exists():
            measured = json.loads(ZERO_SHOT.read_text())["rows"]
            lines += accuracies([(row["title"], row) for row in measured], "## Zero-shot accuracy after recovery")
        lines += ["# Methods and ablations, from 307,200 tokens", ""]
    lines += how
    protocols = {protocol(text) for cell in cells for text in cell["perplexities"]}
    for chosen in sorted(protocols, key=lambda chosen: (chosen.windows, chosen)):
        lines += perplexities(cells, methods, chosen)
    lines += zero_shot(cells) + commands(cells)
    page.write_text("\n".join(lines), encoding="utf-8")
    console.print(f"{page}: {len(cells)} cells", highlight=False)


def learned_short(cells: Iterable[Cell]) -> dict[int, float]:
    """Whole-split perplexities of the full method by ratio."""
    return {
        cell["ratio"]: text["perplexity"]
        for cell in cells if (cell["method"], cell["seed"]) == ("DISP-LLM", 0)
        for text in cell["perplexities"] if protocol(text).length == 2048
    }  # fmt: skip


class Protocol(NamedTuple):
    """How a perplexity was measured; `only` says whether the text has more windows than were read."""

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


def judged(options: str, runtimes: Iterable[str]) -> list[str]:
    """With which command, and on what: compiling, before a cell is judged in ONNX Runtime, changes no figure."""
    where = {"torch": "the torch reference", "onnxruntime": "the artifact that `dispc compile` makes, in ONNX Runtime"}
    on = ", or ".join(where[name] for name in sorted(set(runtimes), reverse=True))
    return [f"`dispc eval MODEL --masks CELL.safetensors {options}`; judged was {on}.", ""]


def perplexities(cells: Sequence[Cell], methods: Sequence[str], chosen: Protocol) -> list[str]:
    """The methods by ratio, and below them what other seeds gave."""
    found = {(cell["method"], cell["ratio"], cell["seed"]): text["perplexity"]
             for cell in cells for text in cell["perplexities"] if protocol(text) == chosen}  # fmt: skip
    ratios = sorted({ratio for _, ratio, _ in found} - {0})
    runtimes = [text.get("runtime", "torch")
                for cell in cells for text in cell["perplexities"] if protocol(text) == chosen]  # fmt: skip
    dense = found.get(("dense", 0, 0))
    lines = [
        f"## Perplexity on {chosen.title}", "", *judged(chosen.options, runtimes),
        *([f"The dense model: {dense:.2f}.", ""] if dense else []),
        *table(("method", *(f"{ratio} %" for ratio in ratios)), [
            (method, *(figure(found, (method, ratio, 0)) for ratio in ratios)) for method in methods
        ]),
    ]  # fmt: skip
    for method in methods:
        for ratio in ratios:
            seeds = {s: value for (m, r, s), value in sorted(found.items()) if (m, r) == (method, ratio) and value}
            if len(seeds) > 1:
                values = list(seeds.values())
                shown = ", ".join(f"{value:.2f} (seed {seed})" for seed, value in seeds.items())
                spread = f"mean {statistics.mean(values):.2f}, standard deviation {statistics.stdev(values):.2f}"
                lines += [f"{method} at {ratio} %: {shown}; {spread}.", ""]
    return lines


def zero_shot(cells: Iterable[Cell]) -> list[str]:
    """Accuracy by task, a table for each way in which it was measured; nothing where no task was."""
    groups: dict[tuple[Any, ...], list[tuple[str, Cell]]] = {}
    for cell in cells:
        title = cell["method"] if not cell["ratio"] else f"{cell['method']}, {cell['ratio']} %"
        for measured in cell["zero_shot"]:
            items = (facts["items"] for facts in measured["tasks"].values())
            groups.setdefault((*measured["names"], *items, measured["limit"]), []).append((title, measured))
    return [line for measured in groups.values() for line in accuracies(measured)]


def accuracies(rows: Sequence[tuple[str, Cell]], heading: str = "## Zero-shot accuracy") -> list[str]:
    """One table: a row per model, and the mean over the tasks with the standard error that theirs add up to."""
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
        heading, "", *judged(options, (measured["runtime"] for _, measured in rows)),
        "TASKS is what `benchmarks/zero_shot_tasks.py` makes. Per cent, with the standard error. The texts were partly "
        "preprocessed by those who published the files: figures compare with each other, not with other tables; a "
        "difference below twice its error says nothing. "
        f"Items{', the first of each task' if limit else ''}: {items}.", "",
        *table(("model", *heads, "mean"), shown),
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


def figure(found: Mapping[tuple[str, int, int], float | None], cell: tuple[str, int, int]) -> str:
    if cell not in found:
        return "not run"
    value = found[cell]  # JSON has null for what is infinite
    return "infinite" if value is None else f"{value:,.2f}" if value < 1e5 else f"{value:.1e}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]
