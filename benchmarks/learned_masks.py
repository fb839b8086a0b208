"""Learn and judge the grid of docs/results.md: methods, ratios and seeds on one model, one cell at a time.

    .venv/bin/python benchmarks/learned_masks.py run ~/.cache/dispc/demo/SmolLM2-135M-Instruct \\
        --train wiki.train.tokens --test wiki.test.raw
    .venv/bin/python benchmarks/learned_masks.py judge MODEL --masks DIR --test wiki.test.raw --max-windows 16
    .venv/bin/python benchmarks/learned_masks.py table

A cell that has its JSON file in benchmarks/results/learned/ is not run again, and one that was interrupted goes on from
its checkpoint. `judge` makes cells of masks that are there, named METHOD-RATIO-SEED.safetensors. `table` writes
docs/results.md from the cells.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from common import WORK, console, dispc, run, write_result
from machine import REPOSITORY, environment

from dispc.learn.estimator import OFFSET

RESULTS = REPOSITORY / "benchmarks" / "results" / "learned"
PAGE = REPOSITORY / "docs" / "results.md"
METHODS: dict[str, tuple[str, ...]] = {
    "random": ("--method", "random"),
    "magnitude": ("--method", "magnitude"),
    "activation": ("--method", "activation"),
    "constrained": ("--constrained",),
    "no hypernetwork": ("--no-hypernetwork",),
    "DISP-LLM": (),
}
LEARNED = ("constrained", "no hypernetwork", "DISP-LLM")
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Cell:
    """One row of the grid; `dense` is a method with ratio 0."""

    method: str
    ratio: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method.lower().replace(' ', '-')}-{self.ratio}-{self.seed}"


def grid(ratios: list[int], seeds: int) -> list[Cell]:
    """Every method at every ratio, and further seeds of the full method at the highest."""
    cells = [Cell("dense", 0)]
    cells += [Cell(method, ratio) for ratio in reversed(ratios) for method in reversed(METHODS)]
    return cells + [Cell("DISP-LLM", max(ratios), seed) for seed in range(1, seeds)]


@app.command("run")
def run_grid(
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory.")],
    train: Annotated[Path, typer.Option(help="Text to learn on.")],
    test: Annotated[Path, typer.Option(help="Text to judge on.")],
    steps: Annotated[int, typer.Option(help="Steps of each learned cell.")] = 1200,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a step.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="AdamW.")] = 2e-3,
    window: Annotated[int, typer.Option(help="Perplexity window.")] = 2048,
    ratios: Annotated[str, typer.Option(help="Per cent, by commas.")] = "20,30,40,50",
    seeds: Annotated[int, typer.Option(help="Seeds of the full method at the highest ratio.")] = 3,
    results: Annotated[Path, typer.Option(help="Where the cells' results go.")] = RESULTS,
) -> None:
    """Run the cells that are missing."""
    settings = ("--steps", steps, "--sequence-length", sequence_length, "--learning-rate", learning_rate)
    for cell in grid([int(ratio) for ratio in ratios.split(",")], seeds):
        file = results / f"{cell.name}.json"
        if file.exists():
            continue
        console.print(f"{cell.name} ...", highlight=False)
        masks = WORK / "learned" / f"{cell.name}.safetensors"
        start = time.perf_counter()
        learning: list[Any] = []
        if cell.method != "dense":
            resume = masks.with_suffix(".learn").joinpath("checkpoint.pt").exists()
            learning = [
                "learn", model, "--data", train, "-o", masks, "-r", cell.ratio / 100, "--seed", cell.seed,
                *METHODS[cell.method], *(settings if cell.method in LEARNED else ()),
            ]  # fmt: skip
            masks.parent.mkdir(parents=True, exist_ok=True)
            run(dispc(*map(str, learning), "--resume" if resume else "--force"))
        seconds = time.perf_counter() - start
        judge_cell(cell, model, masks if learning else None, test, window, None, results, {
            "learn_seconds": round(seconds, 1), "tokens": steps * sequence_length if cell.method in LEARNED else 0,
            "train": train.name, "command": shown(learning, model),
        })  # fmt: skip


@app.command("judge")
def judge_masks(
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory.")],
    masks: Annotated[Path, typer.Option(help="Directory of mask files METHOD-RATIO-SEED.safetensors.")],
    test: Annotated[Path, typer.Option(help="Text to judge on.")],
    window: Annotated[int, typer.Option(help="Perplexity window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Read no more windows than this.")] = None,
    results: Annotated[Path, typer.Option(help="Where the cells' results go.")] = RESULTS,
) -> None:
    """Judge masks that are there, and the dense model."""
    judge_cell(Cell("dense", 0), model, None, test, window, max_windows, results, {"tokens": 0, "command": ""})
    slugs = {method.lower().replace(" ", "-"): method for method in METHODS}
    for file in sorted(masks.glob("*.safetensors")):
        slug, ratio, seed = file.stem.rsplit("-", 2)
        facts = json.loads(run(dispc("inspect", str(file), "--json")).output)["facts"]
        tokens = int(facts.get("steps", 0)) * int(facts.get("sequence_length", 0)) * int(facts.get("batch_size", 1))
        cell = Cell(slugs[slug], int(ratio), int(seed))
        options = [
            "learn", model, "--data", facts.get("data", "-"), "-r", facts["pruning_ratio"], "--seed", seed,
            *METHODS[cell.method],
        ]  # fmt: skip
        if cell.method in LEARNED:
            options += ["--steps", facts["steps"], "--sequence-length", facts["sequence_length"]]
            options += ["--learning-rate", facts["learning_rate"], "--precision", "bfloat16"]
            options += ["--offset", facts["offset"]] if float(facts.get("offset", OFFSET)) != OFFSET else []
            options += ["--decay"] if facts.get("decay") == "true" else []
        record = {"tokens": tokens, "command": shown(options, model), "train": facts.get("data", "")}
        metrics = file.with_suffix(".learn") / "metrics.jsonl"
        if metrics.exists():
            steps = [json.loads(line) for line in metrics.read_text().splitlines()]
            record["learn_seconds"] = round(sum(tokens / len(steps) / step["tokens_per_second"] for step in steps), 1)
        judge_cell(cell, model, file, test, window, max_windows, results, record)


def shown(options: list[Any], model: Path) -> str:
    """A command line as the page shows it."""
    return " ".join(["dispc", *map(str, options)]).replace(f"{model.parent}/", "") if options else ""


def judge_cell(
    cell: Cell, model: Path, masks: Path | None, test: Path, window: int, max_windows: int | None, results: Path,
    record: dict[str, Any],
) -> None:  # fmt: skip
    """Measure the perplexity of a cell and write its result, and its masks beside it."""
    file = results / f"{cell.name}.json"
    if file.exists():
        return
    console.print(f"judging {cell.name} ...", highlight=False)
    judging: list[Any] = ["eval", model, "--data", test, "--sequence-length", window, "--json"]
    judging += ["--max-windows", max_windows] if max_windows else []
    judging += ["--masks", masks] if masks else []
    report = json.loads(run(dispc(*map(str, judging))).output)
    head = {"method": cell.method, "ratio": cell.ratio, "seed": cell.seed}
    write_result(file, head | record | {"perplexity": report["perplexity"][0], "environment": environment()})
    if masks:
        shutil.copy(masks, results / masks.name)


@app.command()
def table(
    results: Annotated[Path, typer.Option(help="Where the cells' results are.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="The page to write.")] = PAGE,
) -> None:
    """Write the page of results from the cells that are there."""
    cells = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    found = {(cell["method"], cell["ratio"], cell["seed"]): cell for cell in cells}
    ratios = sorted({cell["ratio"] for cell in cells} - {0})
    dense = found.get(("dense", 0, 0))
    lines = ["# Results", "", "Written by `benchmarks/learned_masks.py table`, not by hand.", ""]
    if dense:
        text = dense["perplexity"]
        learned_on = ", ".join(sorted({cell["train"] for cell in cells if cell.get("train")}))
        lines += [
            f"Perplexity on {text['data']}, {text['windows']} windows of {text['sequence_length']} tokens, "
            f"learned on {learned_on}; dense {text['perplexity']:.2f}.",
            "",
        ]
    lines += ["| method | " + " | ".join(f"{ratio} %" for ratio in ratios) + " |", "|---" * (len(ratios) + 1) + "|"]
    for method in METHODS:
        figures = [found.get((method, ratio, 0)) for ratio in ratios]
        shown = [f"{cell['perplexity']['perplexity']:.2f}" if cell else "not run" for cell in figures]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    lines += ["", "| cell | tokens | minutes to learn | command |", "|---|---|---|---|"]
    for cell in (cell for cell in cells if cell["command"]):
        minutes = f"{cell['learn_seconds'] / 60:.1f}" if "learn_seconds" in cell else "-"
        name = f"{cell['method']}, {cell['ratio']} %, seed {cell['seed']}"
        lines.append(f"| {name} | {cell['tokens']:,} | {minutes} | `{cell['command']}` |")
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(f"{page}: {len(cells)} cells", highlight=False)


if __name__ == "__main__":
    app()
