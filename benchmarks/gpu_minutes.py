"""Everything that only a GPU can show, in one command, the most important first; an interrupted run keeps its results.

    .venv/bin/python benchmarks/gpu_minutes.py --minutes 9 --json benchmarks/results/gpu-minutes.json
    .venv/bin/python benchmarks/gpu_minutes.py --smoke            # the same on the CPU, with tiny models

Stages run in this order, each in processes of its own with a time limit; unused time goes to the next stage:

1. facts: GPU, driver, versions, `dispc doctor`, bandwidth of a large copy
2. right: tiny artifacts of every family through all of `dispc validate`'s checks (gpu_right.py; --prepared DIR uses
   those that `gpu_right.py prepare DIR` made elsewhere)
3. fast: the LLaMA-2-7B shape at batch 1, dense and half pruned with learned-like widths, with and without CUDA graph
4. paper: PyTorch's Algorithm 1 in a CUDA graph, and through torch.compile, the same cells
5. int4: the same shape with four-bit weights
6. batches: batch 8, and a prefill of 2,048 tokens
7. learning, with --model DIR and --data TEXT: the paper's recipe in bfloat16 at 30 and 50 %, side by side

The checkpoint and its artifacts are made in the background from the start (gpu_prepare.py). The JSON file and a
Markdown table beside it are rewritten after every cell. A failure is recorded with its last lines, and the run goes on.
docs/performance.md says what each stage assumes of a GPU.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from children import Record, kill_group, parse, start
from common import WORK, console, remove, write_result
from gpu import COLUMNS, judge, table_row, with_speedups
from gpu_prepare import VARIANTS, Preparation, as_argument
from gpu_stages import HERE, SIZES, SMOKE_SIZES, STAGES, Run
from machine import environment

ALL_STAGES = ",".join(stage.name for stage in STAGES)


@contextmanager
def preparing(run: Run) -> Iterator[None]:
    """Make checkpoint and artifacts in the background; what is unfinished at the end is given up."""

    def note(found: Record) -> None:
        if "error" in found and "prepared" in found:
            run.failed.add(found["prepared"])
        run.record(found)

    command = [sys.executable, str(HERE / "gpu_prepare.py"), as_argument(run.preparation)]
    log = (run.work / "prepare.txt").open("w")
    process = start(command, log)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if (found := parse(line)) is not None:
                note({"stage": "prepare"} | found)
        if process.wait() > 0:
            run.failed.update(run.preparation.variants)
            note({"stage": "prepare", "error": f"ended with {process.returncode}: see {run.work / 'prepare.txt'}"})

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield
    finally:
        kill_group(process)
        reader.join()
        log.close()


def tables(result: Record) -> str:
    """The result as Markdown."""
    rate = result["device"].get("copy_gb_per_second", float("nan"))
    lines = [f"# {result['device'].get('name')}, {result['dtype']}", ""]
    judged = [row for row in result["rows"] if row.get("stage") == "right" and "artifact" in row]
    passed = sum(row["passed"] for row in judged)
    lines += [f"Right: {passed} of {len(judged)} artifacts pass every check on the device.", ""]
    lines += [f"- FAILED {row['artifact']}: {'; '.join(row['failed'])[:300]}" for row in judged if not row["passed"]]
    lines += ["", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(table_row(cell, rate))} |" for cell in with_speedups(result["cells"])]
    lines += ["", *(f"- {'reached' if met else 'NOT reached'}: {goal}" for goal, met in result["goals"].items())]
    lines += ["", "| stage | seconds | limit |", "|---|---|---|"]
    lines += [f"| {stage['name']} | {stage['seconds']} | {stage['limit']} |" for stage in result["stages"]]
    return "\n".join(lines) + "\n"


def main(
    minutes: Annotated[float, typer.Option(help="For everything; stages share it as in their table.")] = 9.0,
    stages: Annotated[str, typer.Option(help="Which to run.")] = ALL_STAGES,
    prepared: Annotated[Path | None, typer.Option(help="Artifacts of `gpu_right.py prepare`.")] = None,
    model: Annotated[Path | None, typer.Option(help="Real weights, for learning.")] = None,
    data: Annotated[Path | None, typer.Option(help="Text, for learning.")] = None,
    folders: Annotated[str, typer.Option(help="Folders for the 7B shape: 70 GB together.")] = str(WORK / "gpu"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that make or judge artifacts at the same time.")] = 8,
    reuse: Annotated[bool, typer.Option("--reuse", help="Keep what an earlier run prepared in --folders.")] = False,
    smoke: Annotated[bool, typer.Option(help="Tiny models on the CPU: does it run?")] = False,
) -> None:
    """Parity, speed and learning on a GPU within a few minutes."""
    if unknown := set(stages.split(",")) - {stage.name for stage in STAGES}:
        raise typer.BadParameter(f"unknown stage {min(unknown)}")
    work = Path(folders.split(",")[0])
    if not reuse:
        remove(work)
    work.mkdir(parents=True, exist_ok=True)
    workers = 2 if smoke else workers
    preparation = Preparation(
        shape="tiny" if smoke else "llama-2-7b",
        target="onnx-cpu" if smoke else "onnx-cuda",
        folders=tuple(folders.split(",")),
        variants=tuple(VARIANTS),
        workers=workers,
    )
    result: Record = {"benchmark": "gpu_minutes", "smoke": smoke, "environment": environment(), "device": {}}
    result |= {"dtype": "float32" if smoke else "float16", "cells": [], "rows": [], "stages": [], "goals": {}}
    lock = threading.Lock()

    def record(found: Record) -> None:
        with lock:
            if "device" in found:
                result["device"] = found["device"]
            result["cells" if "runtime" in found else "rows"].append(found)
            rate = result["device"].get("copy_gb_per_second", float("nan"))
            result["goals"] = {} if smoke else judge(with_speedups(result["cells"]), rate)
            console.print(json.dumps(found)[:400], highlight=False, soft_wrap=True, markup=False)
            write_result(json_file, result)
            if json_file is not None:
                json_file.with_suffix(".md").write_text(tables(result), encoding="utf-8")

    run = Run(
        device="cpu" if smoke else "cuda",
        dtype=result["dtype"],
        preparation=preparation,
        prepared=prepared,
        workers=workers,
        model=model,
        data=data,
        work=work,
        record=record,
        sizes=SMOKE_SIZES if smoke else SIZES,
    )
    chosen = [stage for stage in STAGES if stage.name in stages.split(",")]
    scale = 60 * minutes / sum(stage.seconds for stage in chosen)
    run.end = time.monotonic()
    with preparing(run):
        for stage in chosen:
            run.end += stage.seconds * scale
            started, limit = time.monotonic(), run.left
            console.print(f"== {stage.name}, at most {limit:.0f} s", highlight=False)
            stage.run(run)
            result["stages"].append(
                {"name": stage.name, "seconds": round(time.monotonic() - started, 1), "limit": round(limit, 1)}
            )
            record({"stage": stage.name, "ended": True})
    console.print(tables(result), highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    typer.run(main)
