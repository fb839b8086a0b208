"""Task definitions for `dispc eval --include`: the paper's five zero-shot tasks, over data files and without a network.

    .venv/bin/python benchmarks/zero_shot_tasks.py DATA -o benchmarks/work/tasks
    dispc eval MODEL --tasks local_piqa,local_arc_easy --include benchmarks/work/tasks

DATA holds the files that TASKS names. Prompts and metrics are those of lm-evaluation-harness. The publishers of the
files preprocessed some texts: compare the figures with each other, not with other tables.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from common import console

Item = dict[str, Any]


def piqa(folder: Path) -> Iterator[Item]:
    labels = (folder / "piqa_valid-labels.lst").read_text(encoding="utf-8").split()
    for row, label in zip(_json_lines(folder / "piqa_valid.jsonl"), labels, strict=True):
        text = f"Question: {row['goal']}\nAnswer:"
        yield {"text": text, "choices": [row["sol1"], row["sol2"]], "target": int(label)}


def arc(name: str) -> Callable[[Path], Iterator[Item]]:
    def items(folder: Path) -> Iterator[Item]:
        for row in _json_lines(folder / f"foundry_{name}.jsonl"):
            yield {"text": f"{row['query']}\nAnswer:", "choices": row["choices"], "target": row["gold"]}

    return items


def hellaswag(folder: Path) -> Iterator[Item]:
    lines = (folder / "hellaswag_val_full.txt").read_text(encoding="utf-8").splitlines()
    for at in range(0, len(lines), 6):
        context, label, *endings = lines[at : at + 6]
        yield {"text": context, "choices": endings, "target": int(label)}


def winogrande(folder: Path) -> Iterator[Item]:
    """Two contexts and one continuation; the text is the number of the right context, as lm-eval expects it."""
    for row in _json_lines(folder / "foundry_winogrande.jsonl"):
        yield {"text": row["gold"], "choices": row["context_options"], "target": row["continuation"]}


@dataclass(frozen=True)
class Task:
    """How a task's items are read, and the metrics that lm-evaluation-harness reports for it."""

    items: Callable[[Path], Iterator[Item]]
    metrics: tuple[str, ...]


TASKS = {
    "local_piqa": Task(piqa, ("acc", "acc_norm")),
    "local_winogrande": Task(winogrande, ("acc",)),
    "local_hellaswag": Task(hellaswag, ("acc", "acc_norm")),
    "local_arc_easy": Task(arc("arc_easy"), ("acc", "acc_norm")),
    "local_arc_challenge": Task(arc("arc_challenge"), ("acc", "acc_norm")),
}


def definition(name: str, data: Path) -> Item:
    """The task as lm-evaluation-harness reads it; JSON is YAML."""
    return {
        "task": name,
        "output_type": "multiple_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "text",
        "doc_to_choice": "choices",
        "doc_to_target": "target",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in TASKS[name].metrics
        ],
        "metadata": {"version": 1.0},
    }


def prepare(folder: Path, output: Path) -> dict[str, int]:
    """Write items and definition of every task; returns the number of items of each."""
    output.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, task in TASKS.items():
        data = (output / f"{name}.jsonl").resolve()
        items = list(task.items(folder))
        data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        (output / f"{name}.yaml").write_text(json.dumps(definition(name, data), indent=2) + "\n", encoding="utf-8")
        counts[name] = len(items)
    return counts


def _json_lines(path: Path) -> list[Item]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(
    data: Annotated[Path, typer.Argument(help="Directory with the tasks' data files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
) -> None:
    """Write the tasks."""
    counts = prepare(data, output)
    console.print(f"{output}: {', '.join(f'{name} ({count:,})' for name, count in counts.items())}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
