"""Learn and judge the grid of docs/results.md: methods, ratios and seeds on one model, one cell at a time.

    .venv/bin/python benchmarks/learned_masks.py run ~/.cache/dispc/demo/SmolLM2-135M-Instruct \\
        --train wiki.train.tokens --test wiki.test.raw
    .venv/bin/python benchmarks/learned_masks.py table

A cell that has its JSON file in benchmarks/results/learned/ is not run again, and one that was interrupted goes on from
its checkpoint. `table` writes docs/results.md from those files.
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
        judging = ["eval", model, "--data", test, "--sequence-length", window, "--json"]
        judging += ["--masks", masks] if learning else []
        report = json.loads(run(dispc(*map(str, judging))).output)
        write_result(
            file,
            {
                "method": cell.method, "ratio": cell.ratio, "seed": cell.seed, "learn_seconds": round(seconds, 1),
                "tokens": steps * sequence_length if cell.method in LEARNED else 0,
                "perplexity": report["perplexity"][0], "train": train.name,
                "command": " ".join(["dispc", *map(str, learning)]).replace(f"{model.parent}/", ""),
                "environment": environment(),
            },
        )  # fmt: skip
        if learning:
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
        lines += [
            f"Perplexity on {text['data']}, {text['windows']} windows of {text['sequence_length']} tokens, "
            f"learned on {dense['train']}; dense {text['perplexity']:.2f}.",
            "",
        ]
    lines += ["| method | " + " | ".join(f"{ratio} %" for ratio in ratios) + " |", "|---" * (len(ratios) + 1) + "|"]
    for method in METHODS:
        figures = [found.get((method, ratio, 0)) for ratio in ratios]
        shown = [f"{cell['perplexity']['perplexity']:.2f}" if cell else "not run" for cell in figures]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    lines += ["", "| cell | tokens | minutes to learn | command |", "|---|---|---|---|"]
    for cell in cells:
        name = f"{cell['method']}, {cell['ratio']} %, seed {cell['seed']}"
        lines.append(f"| {name} | {cell['tokens']:,} | {cell['learn_seconds'] / 60:.1f} | `{cell['command']}` |")
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(f"{page}: {len(cells)} cells", highlight=False)


if __name__ == "__main__":
    app()
