"""What padding on the left costs on the CPU: the same pruned model compiled for either side, batch 1.

    .venv/bin/python benchmarks/padding.py --model SMOLLM2_DIR --masks dispc/data/smollm2-135m-30.safetensors \\
        --json benchmarks/results/padding.json

Rows, timed alternately: padding right as applications run it, with past and present in one buffer; padding right with
growing caches, as every runtime can; padding left, whose caches always grow and whose mask is computed in the graph.
One call is one decoding step with `past` tokens in the caches, or one prefill. Ratios are to the first row, round by
round.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from common import WORK, compile_artifact, median_ratio, numbers, remove, report, summary, write_result
from contenders import find_model
from machine import environment, load

from dispc.runtime.latency import TimedArtifact
from dispc.runtime.providers import CPU
from dispc.runtime.timing import alternate

TARGET = "onnx-cpu"
SHARED, GROWING, LEFT = "right, one buffer", "right, caches grow", "left, caches grow"


def load_all(model: Path, masks: Path | None, work: Path, threads: int) -> dict[str, TimedArtifact]:
    """The rows by name; the first two are the same artifact."""
    for padding in ("right", "left"):
        compile_artifact(model, work / padding, TARGET, masks, padding=padding)
    rows = {
        name: TimedArtifact(work / name.split(",")[0], CPU, threads, graph=False) for name in (SHARED, GROWING, LEFT)
    }
    rows[GROWING].shared = False
    return rows


def main(
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Mask file [none: the dense model].")] = None,
    pasts: Annotated[str, typer.Option(help="Numbers of tokens in the caches.")] = "64,512",
    prompts: Annotated[str, typer.Option(help="Tokens per prompt.")] = "128",
    threads: Annotated[int, typer.Option(help="Threads within a node.")] = 2,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 15,
    calls: Annotated[int, typer.Option(help="Counted tokens per round and row.")] = 12,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for what is written.")] = WORK / "padding",
    smoke: Annotated[bool, typer.Option(help="Tiny model, one round: does it run?")] = False,
) -> None:
    """What padding on the left costs on the CPU."""
    if smoke:
        pasts, prompts, rounds, calls = "8,16", "8", 1, 1
    work.mkdir(parents=True, exist_ok=True)
    source = find_model(model, None if model else "tiny", work)
    result: dict[str, Any] = {
        "benchmark": "padding",
        "model": source.name,
        "masks": masks.name if masks else None,
        "threads": threads,
        "rounds": rounds,
        "calls": calls,
        "smoke": smoke,
        "environment": environment(),
    }
    loaded, rows = load_all(source, masks, work, threads), []
    for kind, lengths in (("past", pasts), ("prompt", prompts)):
        for length in numbers(lengths):
            runs: dict[str, Callable[[], None]] = {
                name: one.step(1, length) if kind == "past" else one.prefill(1, length) for name, one in loaded.items()
            }
            times = alternate(runs, rounds, calls if kind == "past" else 1)
            found = result[f"{kind}_{length}"] = {
                name: {"milliseconds": summary(values), "ratio": round(median_ratio(values, times[SHARED]), 3)}
                for name, values in times.items()
            }
            for name, row in found.items():
                milliseconds = [f"{row['milliseconds'][key]:.2f}" for key in ("median", "min", "max")]
                rows.append([name, f"{kind} {length}", *milliseconds, f"{row['ratio']:.3f}"])
    result["load_after"] = load()
    del loaded
    remove(work)
    columns = ("", "", "median ms", "min ms", "max ms", "times")
    report(f"{result['model']}, {result['masks']}, {threads} threads, {rounds} rounds", columns, rows, {})
    write_result(json_file, result)


if __name__ == "__main__":
    typer.run(main)
