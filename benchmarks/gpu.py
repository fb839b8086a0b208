"""LLaMA-2-7B and -13B shapes on a CUDA machine: dense and pruned, ONNX Runtime against PyTorch's Algorithm 1.

    .venv/bin/python benchmarks/gpu.py --json benchmarks/results/gpu.json
    .venv/bin/python benchmarks/gpu.py --shapes llama-2-7b --pruned 0,50 --batches 1 --lengths ""

Needs a CUDA build of PyTorch 2.9 or newer, onnxruntime-gpu, and for 13B 55 GB of disk under --work; the script makes
everything else, with random weights. Masks have uneven widths like learned ones (learned_like.py). Each model runs in
processes of its own (gpu_cells.py):

- PyTorch: Algorithm 1 in float16, eager; and through torch.compile with CUDA graphs (decoding only)
- ORT: the artifact of `dispc compile` for onnx-cuda, once per lowering, past and present in one buffer; and as a CUDA
  graph (decoding only)

Logits are compared with eager PyTorch's before anything is timed. A cell that fails or does not fit is recorded with
the reason, and the others go on; the JSON file is written after every cell. A decode cell repeats the same decoding
step. Speed-up is over the dense model in the same runtime. GB/s are the bytes that a step must read; "of copy" is their
share of the bandwidth of a large copy in the device's memory; "indexing" is the share of time in Gathers and Scatters.
Driver and clocks are recorded. --smoke runs everything on the CPU.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage
from typing import Annotated, Any

import typer
from children import Record
from common import WORK, compile_artifact, console, numbers, remove, report, write_result
from gpu_jobs import CUDA_GRAPH, ONNX_RUNTIME, ORT, PYTORCH, Cell, Job, run_jobs
from learned_like import learned_like
from machine import environment
from make_checkpoint import make_checkpoint
from shapes import SHAPES

from dispc.lowerings import CUDA, LOWERINGS
from dispc.model.published import open_checkpoint
from dispc.support.errors import first_line

SPEEDUP_GOAL, RATE_GOAL = 1.9, 0.85
GOAL_PRUNED = 50
COLUMNS = (
    "",
    "phase",
    "batch",
    "tokens",
    "median ms",
    "max ms",
    "tokens/s",
    "speed-up",
    "GB/s",
    "of copy",
    "indexing",
)
CUDA_LOWERINGS = ",".join(row.name for row in LOWERINGS.values() if row.runs(CUDA, "float16"))


def with_speedups(cells: Sequence[Record]) -> list[Record]:
    """The cells; those of pruned models have their speed-up over the same cell of the dense model."""

    def key(cell: Record) -> tuple[Any, ...]:
        return tuple(cell[name] for name in ("shape", "runtime", "phase", "batch", "tokens"))

    dense = {
        key(cell): cell["milliseconds"]["median"] for cell in cells if cell["pruned"] == 0 and "milliseconds" in cell
    }
    return [
        cell | {"speedup": round(dense[key(cell)] / cell["milliseconds"]["median"], 3)}
        if cell["pruned"] and "milliseconds" in cell and key(cell) in dense
        else cell
        for cell in cells
    ]


def judge(cells: Sequence[Record], copy_rate: float) -> dict[str, bool]:
    """The goals of decoding at batch 1: the fastest half pruned ORT row against the fastest dense ORT row."""
    goals = {}
    judged = {"phase": "decode", "batch": 1}.items()
    timed = [
        cell
        for cell in cells
        if "milliseconds" in cell and judged <= cell.items() and cell["runtime"] in (ORT, CUDA_GRAPH)
    ]
    for shape, tokens in dict.fromkeys((cell["shape"], cell["tokens"]) for cell in timed):
        rows = [cell for cell in timed if (cell["shape"], cell["tokens"]) == (shape, tokens)]
        dense, pruned = (
            min(
                (row for row in rows if row["pruned"] == share),
                key=lambda row: row["milliseconds"]["median"],
                default=None,
            )
            for share in (0, GOAL_PRUNED)
        )
        if dense is None or pruned is None:
            continue
        speedup = dense["milliseconds"]["median"] / pruned["milliseconds"]["median"]
        rate = pruned["gb_per_second"] / copy_rate
        what = f"{shape}, {GOAL_PRUNED} % pruned, past {tokens}"
        goals[f"{what}: {speedup:.2f} times as fast as dense (goal {SPEEDUP_GOAL})"] = speedup >= SPEEDUP_GOAL
        goals[f"{what}: {rate:.2f} of a copy's bytes per second (goal {RATE_GOAL})"] = rate >= RATE_GOAL
    return goals


def table_row(cell: Record, copy_rate: float) -> list[str]:
    """One line of the printed table."""
    name = f"{cell['shape']} {cell['pruned']} % {cell['runtime']} {cell.get('lowering') or ''}".strip()
    row = [name, cell["phase"], str(cell["batch"]), str(cell["tokens"])]
    if "milliseconds" not in cell:
        return [*row, *(["skipped" if "skipped" in cell else "error"] + [""] * 6)]
    row += [f"{cell['milliseconds']['median']:.3f}", f"{cell['milliseconds']['max']:.3f}"]
    row += [f"{cell['tokens_per_second']:.1f}", f"{cell['speedup']:.2f}" if "speedup" in cell else ""]
    rate = cell.get("gb_per_second")
    row += [f"{rate:.0f}", f"{rate / copy_rate:.2f}"] if rate else ["", ""]
    share = cell.get("indexing", {}).get("share")
    return [*row, "" if share is None else f"{100 * share:.1f} %"]


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of each shape: `percents` of the block parameters pruned (0 is dense), in each of the `lowerings`.

    `timeout` is in seconds, for one model in PyTorch or in ONNX Runtime.
    """

    percents: Sequence[int]
    lowerings: Sequence[str]
    target: str
    timeout: float


def run_shape(shape: str, models: Models, job: Job, work: Path, record: Callable[[Record], None]) -> None:
    """Measure every model of a shape in every runtime; `job` has what is common to all."""
    make_checkpoint(Path(job.model), shape)
    for percent in models.percents:
        common: Record = {"shape": shape, "pruned": percent, "lowering": None, "kept": 1.0}
        masks = None
        if percent:
            masks = work / f"{shape}-{percent}.safetensors"
            common["kept"] = draw_masks(Path(job.model), percent, masks)
        Path(str(job.reference)).unlink(missing_ok=True)
        pytorch = replace(job, masks=str(masks) if masks else None)
        run_job(pytorch, models.timeout, work, common, record)
        for lowering in models.lowerings if percent else (None,):
            artifact, options = work / "artifact", {"lowering": lowering} if lowering else {}
            onnx = replace(pytorch, artifact=str(artifact), runtimes=ONNX_RUNTIME[job.device])
            common |= {"lowering": lowering}
            try:
                compile_artifact(Path(job.model), artifact, models.target, masks, **options)
            except Exception as error:  # one lowering that does not compile leaves the others
                for cell in onnx.planned_records():
                    record(common | cell | {"error": f"compile: {first_line(error)}"})
                continue
            run_job(onnx, models.timeout, work, common, record)
            remove(artifact)
    remove(Path(job.model))


def draw_masks(model: Path, percent: int, file: Path) -> float:
    """Write masks with widths like learned ones; the share of block parameters that they keep."""
    config = open_checkpoint(model).config
    masks = learned_like(config, 1 - percent / 100, seed=0)
    masks.save(file, config)
    return round(masks.kept_parameters(config) / config.all_block_parameters, 4)


def run_job(job: Job, timeout: float, work: Path, common: Record, record: Callable[[Record], None]) -> None:
    """Measure a job in a process of its own; `common` is part of each record."""
    run_jobs([job], timeout, work, lambda _, found: record(common | found))


def main(
    shapes: Annotated[str, typer.Option(help="Shapes of shapes.py.")] = "llama-2-7b,llama-2-13b",
    pruned: Annotated[str, typer.Option(help="Percentages of block parameters pruned; 0 is dense.")] = "0,20,30,40,50",
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,64",
    pasts: Annotated[str, typer.Option(help="Tokens in the caches when decoding.")] = "512,2048",
    lengths: Annotated[str, typer.Option(help="Tokens of a prefill.")] = "2048",
    lowerings: Annotated[str, typer.Option(help="Lowerings of the pruned artifacts.")] = CUDA_LOWERINGS,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 5,
    calls: Annotated[int, typer.Option(help="Counted calls per round.")] = 20,
    timeout: Annotated[float, typer.Option(help="Seconds for one model in PyTorch or in ONNX Runtime.")] = 3600,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for weights and artifacts.")] = WORK / "gpu",
    smoke: Annotated[bool, typer.Option(help="A tiny model on the CPU, one round: does it run?")] = False,
) -> None:
    """Decoding and prefill on a GPU: pruned against dense."""
    device, dtype, target = "cuda", "float16", "onnx-cuda"
    if smoke:
        device, dtype, target = "cpu", "float32", "onnx-cpu"
        shapes, pruned, batches, pasts, lengths, rounds, calls = "tiny", "0,50", "2", "8", "16", 1, 2
    names = shapes.split(",")
    if unknown := set(names) - {*SHAPES}:
        raise typer.BadParameter(f"unknown shape {min(unknown)}; shapes are {', '.join(SHAPES)}")
    work.mkdir(parents=True, exist_ok=True)
    planned = [Cell(phase="decode", batch=batch, tokens=past) for batch in numbers(batches) for past in numbers(pasts)]
    planned += [Cell(phase="prefill", batch=batch, tokens=n) for batch in numbers(batches) for n in numbers(lengths)]
    cells: list[Record] = []
    result: Record = {"benchmark": "gpu", "smoke": smoke, "environment": environment(), "device": {}, "cells": cells}
    result |= {"dtype": dtype, "rounds": rounds, "calls": calls}

    models = Models(percents=sorted(numbers(pruned)), lowerings=lowerings.split(","), target=target, timeout=timeout)

    def record(found: Record) -> None:
        if "device" in found:
            result["device"] = found["device"]
        else:
            cells.append(found)
            line = " | ".join([*table_row(found, float("nan")), found.get("error", ""), found.get("skipped", "")])
            console.print(line, highlight=False, soft_wrap=True)
        write_result(json_file, result | {"cells": with_speedups(cells)})

    for shape in names:
        needed = 4 * sum(math.prod(dimensions) for dimensions in SHAPES[shape].tensors().values())
        if needed > disk_usage(work).free:  # the checkpoint, and an artifact as large
            console.print(f"{shape}: skipped, it needs {needed / 10**9:.0f} GB of disk at {work}", highlight=False)
            result.setdefault("skipped_shapes", []).append(shape)
            continue
        job = Job(
            model=str(work / shape),
            masks=None,
            artifact=None,
            reference=str(work / "reference.npy"),
            runtimes=PYTORCH[device],
            device=device,
            dtype=dtype,
            cells=tuple(planned),
            rounds=rounds,
            calls=calls,
        )
        run_shape(shape, models, job, work, record)

    result["cells"] = with_speedups(cells)
    rate = result["device"].get("copy_gb_per_second", float("nan"))
    result["goals"] = {} if smoke else judge(cells, rate)
    rows = [table_row(cell, rate) for cell in result["cells"]]
    report(f"{result['device'].get('name')}, {dtype}", COLUMNS, rows, result["goals"])
    write_result(json_file, result)
    remove(work)


if __name__ == "__main__":
    typer.run(main)
