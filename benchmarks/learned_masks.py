"""Learn and judge the grid of docs/results.md: methods, ratios and seeds on one model, one cell at a time.

    .venv/bin/python benchmarks/learned_masks.py learn MODEL --data wikitext-mixed.txt --masks DIR
    .venv/bin/python benchmarks/learned_masks.py judge MODEL --masks DIR --test wiki.test.raw --max-windows 16
    .venv/bin/python benchmarks/learned_masks.py zero-shot MODEL --masks DIR --tasks DIR2 --limit 200
    .venv/bin/python benchmarks/learned_masks.py table

`learn` writes the missing mask files METHOD-RATIO-SEED.safetensors; an interrupted one resumes from its checkpoint.
`judge` and `zero-shot` add the missing figures to the cells' JSON files in benchmarks/results/learned/ (DIR2 is made by
zero_shot_tasks.py); with `--compiled` they judge artifacts, which is faster and gives the same figures. `table` writes
docs/results.md from them. The training text is made by learning_text.py.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from common import console, dispc, json_report, run, write_result
from machine import REPOSITORY, environment
from results_page import RECOVERY, write_page

from dispc.learn.estimator import OFFSET
from dispc.masks import Masks
from dispc.model.published import open_checkpoint

RESULTS = REPOSITORY / "benchmarks" / "results" / "learned"
METHODS: dict[str, tuple[str, ...]] = {
    "random": ("--method", "random"),
    "magnitude": ("--method", "magnitude"),
    "activation": ("--method", "activation"),
    "middle": ("--method", "middle"),
    "gradient": ("--method", "gradient"),
    "constrained": ("--constrained",),
    "no hypernetwork": ("--no-hypernetwork",),
    "DISP-LLM": (),
}
SLUGS = {method.lower().replace(" ", "-"): method for method in METHODS}
LEARNED = ("constrained", "no hypernetwork", "DISP-LLM")
READING, SEEDED = (*LEARNED, "activation", "middle", "gradient"), (*LEARNED, "random")
RATES = {"no hypernetwork": 0.05}
"""Learning rates other than 2e-3: without a hypernetwork, a latent moves by about the rate in each step."""
RUNTIMES = {False: "torch", True: "onnxruntime"}
ABOVE = 35
"""Per cent pruned above which the offset is 4 instead of 5: more gates must close (decision 0010)."""
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
ModelArgument = Annotated[Path, typer.Argument(help="Hugging Face model directory.")]
MasksOption = Annotated[Path, typer.Option(help="Directory of mask files METHOD-RATIO-SEED.safetensors.")]
CompiledOption = Annotated[bool, typer.Option("--compiled", help="Judge the artifact, not the torch reference.")]
ResultsOption = Annotated[Path, typer.Option(help="Where the cells' results are.")]


@dataclass(frozen=True)
class Cell:
    """One row of the grid; `dense` is a method with ratio 0."""

    method: str
    ratio: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method.lower().replace(' ', '-')}-{self.ratio}-{self.seed}"

    @staticmethod
    def of(file: Path) -> "Cell":
        slug, ratio, seed = file.stem.rsplit("-", 2)
        return Cell(SLUGS[slug], int(ratio), int(seed))


DENSE = Cell("dense", 0)


def grid(ratios: list[int], seeds: int) -> list[Cell]:
    """Every method at every ratio, and further seeds of the full method at the highest."""
    cells = [Cell(method, ratio) for method in reversed(METHODS) for ratio in reversed(ratios)]
    return cells + [Cell("DISP-LLM", max(ratios), seed) for seed in range(1, seeds)]


@app.command()
def learn(
    model: ModelArgument,
    data: Annotated[Path, typer.Option(help="Text to learn on.")],
    masks: MasksOption,
    steps: Annotated[int, typer.Option(help="Steps of each learned cell.")] = 1200,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a step.")] = 256,
    ratios: Annotated[str, typer.Option(help="Per cent, by commas.")] = "20,30,40,50",
    seeds: Annotated[int, typer.Option(help="Seeds of the full method at the highest ratio.")] = 3,
) -> None:
    """Learn the missing mask files."""
    masks.mkdir(parents=True, exist_ok=True)
    for cell in grid([int(ratio) for ratio in ratios.split(",")], seeds):
        file = masks / f"{cell.name}.safetensors"
        if file.exists():
            continue
        console.print(f"{cell.name} ...", highlight=False)
        options: list[Any] = ["-r", cell.ratio / 100, *inputs(cell, data)]
        if cell.method in LEARNED:
            options += ["--steps", steps, "--sequence-length", sequence_length, "--precision", "bfloat16", "--decay"]
            options += ["--learning-rate", RATES.get(cell.method, 2e-3), "--offset", 4 if cell.ratio > ABOVE else 5]
            options += ["--resume" if file.with_suffix(".learn").exists() else "--force"]
        run(dispc(*map(str, ["learn", model, "-o", file, *options])))


@app.command()
def judge(
    model: ModelArgument,
    masks: MasksOption,
    test: Annotated[Path, typer.Option(help="Text to judge on.")],
    window: Annotated[int, typer.Option(help="Perplexity window.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(help="Read no more windows than this.")] = None,
    only: Annotated[str, typer.Option(help="Methods to judge, by commas; all, if empty.")] = "",
    compiled: CompiledOption = False,
    results: ResultsOption = RESULTS,
) -> None:
    """Measure the missing perplexities of the dense model and of mask files."""
    wanted = {"data": test.name, "sequence_length": window, "max_windows": max_windows}
    for cell, file in cells_of(masks, only):
        record = read_record(results, cell, file, model)
        if known(record["perplexities"], wanted):
            continue
        console.print(f"judging {cell.name} ...", highlight=False)
        options: list[Any] = ["--data", test, "--sequence-length", window]
        options += ["--max-windows", max_windows] if max_windows else []
        report = evaluate(model, file, options, compiled=compiled)
        record["perplexities"].append(wanted | report["perplexity"][0] | circumstances(compiled))
        write_record(results, cell, file, record)


@app.command()
def zero_shot(
    model: ModelArgument,
    masks: MasksOption,
    tasks: Annotated[Path, typer.Option(help="Directory that benchmarks/zero_shot_tasks.py wrote.")],
    limit: Annotated[int | None, typer.Option(help="Read no more items per task than this.")] = None,
    only: Annotated[str, typer.Option(help="Methods to judge, by commas; all, if empty.")] = "DISP-LLM",
    compiled: CompiledOption = False,
    results: ResultsOption = RESULTS,
) -> None:
    """Measure the missing zero-shot accuracies of the dense model and of mask files."""
    names = sorted(file.stem for file in tasks.glob("*.yaml"))
    wanted = {"names": names, "limit": limit}
    for cell, file in cells_of(masks, only):
        record = read_record(results, cell, file, model)
        if cell.seed or known(record["zero_shot"], wanted):
            continue
        console.print(f"zero-shot tasks of {cell.name} ...", highlight=False)
        options: list[Any] = ["--tasks", ",".join(names), "--include", tasks, *(["--limit", limit] if limit else [])]
        report = evaluate(model, file, options, compiled=compiled)
        record["zero_shot"].append(wanted | {"tasks": report["tasks"]} | circumstances(compiled))
        write_record(results, cell, file, record)


@app.command()
def table(results: ResultsOption = RESULTS) -> None:
    """Write docs/results.md from the cells that are there."""
    cells = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    write_page(cells, list(METHODS), recovery=RECOVERY)


def inputs(cell: Cell, data: Any) -> list[Any]:
    """The options of `dispc learn` for a cell's method, and the text and the seed where it has them."""
    options: list[Any] = ["--data", data] if cell.method in READING else []
    return [*options, *(["--seed", cell.seed] if cell.method in SEEDED else []), *METHODS[cell.method]]


def cells_of(masks: Path, only: str) -> list[tuple[Cell, Path | None]]:
    """The dense model, and the mask files of the methods in `only`."""
    found = [(Cell.of(file), file) for file in sorted(masks.glob("*.safetensors"))]
    return [(DENSE, None), *((cell, file) for cell, file in found if not only or cell.method in only.split(","))]


def evaluate(model: Path, masks: Path | None, options: list[Any], *, compiled: bool) -> dict[str, Any]:
    """The report of `dispc eval`, on the torch reference or `compiled`, without progress bars in front."""
    with tempfile.TemporaryDirectory() as folder:
        subject: list[Any] = [model, "--masks", masks] if masks else [model]
        if compiled:
            chosen = ["--masks", masks] if masks else ["--dense"]
            subject = [Path(folder) / "artifact"]
            run(dispc("compile", model, *chosen, "--target", "onnx-cpu", "-o", subject[0], "--no-validate"))
        output = run(dispc(*map(str, ["eval", *subject, *options, "--json"]))).output
    return json_report(output)


def known(measurements: list[dict[str, Any]], wanted: dict[str, Any]) -> bool:
    """Whether one of the measurements is the wanted one, in either runtime: both give the same figures."""
    return any(wanted.items() <= measurement.items() for measurement in measurements)


def circumstances(compiled: bool) -> dict[str, Any]:
    """Runtime and machine of a measurement."""
    return {"runtime": RUNTIMES[compiled], "environment": environment()}


def read_record(results: Path, cell: Cell, masks: Path | None, model: Path) -> dict[str, Any]:
    """The record of a cell: its JSON file, if that is of this model and these masks, or a new one."""
    weights = open_checkpoint(model).weights_sha256
    file, stored = results / f"{cell.name}.json", results / f"{cell.name}.safetensors"
    same = masks is None or (stored.exists() and Masks.load(stored).sha256() == Masks.load(masks).sha256())
    if same and file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        if found["model_sha256"] == weights:
            return found
    head = {"method": cell.method, "ratio": cell.ratio, "seed": cell.seed, "model": model.name}
    head |= {"model_sha256": weights, "perplexities": [], "zero_shot": []}
    return head | (learned(cell, masks, model) if masks else {})


def write_record(results: Path, cell: Cell, masks: Path | None, record: dict[str, Any]) -> None:
    write_result(results / f"{cell.name}.json", record)
    if masks:
        shutil.copy(masks, results / masks.name)


def learned(cell: Cell, masks: Path, model: Path) -> dict[str, Any]:
    """How the masks of a file were made: the command, the tokens read, and the seconds of all steps."""
    facts = json.loads(run(dispc("inspect", str(masks), "--json")).output)["facts"]
    options: list[Any] = ["learn", model.name, "-o", masks.name, "-r", facts["pruning_ratio"]]
    options += inputs(cell, facts.get("data"))
    if cell.method in LEARNED:
        options += ["--steps", facts["steps"], "--sequence-length", facts["sequence_length"]]
        options += ["--learning-rate", facts["learning_rate"], "--precision", facts["precision"]]
        options += ["--offset", facts["offset"]] if float(facts.get("offset", OFFSET)) != OFFSET else []
        options += ["--decay"] if facts.get("decay") == "true" else []
    sequences = int(facts.get("steps", 0)) * int(facts.get("batch_size", 1)) or int(facts.get("windows", 0))
    tokens = sequences * int(facts.get("sequence_length", 0))
    found = {"command": " ".join(["dispc", *map(str, options)]), "tokens": tokens, "train": facts.get("data", "")}
    metrics = masks.with_suffix(".learn") / "metrics.jsonl"
    if metrics.exists():
        steps = [json.loads(line) for line in metrics.read_text().splitlines()]
        found["learn_seconds"] = round(sum(tokens / len(steps) / step["tokens_per_second"] for step in steps), 1)
    return found


if __name__ == "__main__":
    app()
