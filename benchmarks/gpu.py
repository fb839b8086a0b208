"""LLaMA-2-7B and -13B shapes on a CUDA machine: dense and pruned, ONNX Runtime against PyTorch's Algorithm 1.

    .venv/bin/python benchmarks/gpu.py --json benchmarks/results/gpu.json
    .venv/bin/python benchmarks/gpu.py --shapes llama-2-7b --pruned 0,50 --batches 1 --lengths ""

Needs a CUDA build of PyTorch 2.9 or newer, onnxruntime-gpu, and for 13B 55 GB of disk under --work; everything else,
random weights too, is made here. Masks have uneven widths like learned ones (learned_like.py). Each model runs in
processes of its own (gpu_cells.py):

- PyTorch: Algorithm 1 in float16, eager; and through torch.compile with CUDA graphs (decoding only)
- ORT: the artifact of `dispc compile` for onnx-cuda, once per lowering, with fixed buffers that past and present share;
  and as a CUDA graph (decoding only)

Logits are compared with eager PyTorch's before anything is timed. A cell that fails or does not fit is recorded with
the reason, and the others go on; the JSON file is written after every cell. Decoding is one token behind as many as are
in the caches, the same again and again. Speed-up is over the dense model in the same runtime. GB/s are the bytes that a
step has to read, and their share is of what a large copy within the device's memory reads and writes. "indexing" is the
share of Gathers and Scatters. Driver and clocks are recorded. --smoke runs all of it on the CPU.
"""

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from shutil import disk_usage
from typing import Annotated, Any

import typer
from common import WORK, compile_artifact, console, remove, report, write_result
from gpu_cells import CUDA_GRAPH, ONNX_RUNTIME, ORT, PYTORCH, Cell, Job
from learned_like import learned_like
from machine import environment
from make_checkpoint import make_checkpoint
from shapes import SHAPES

from dispc.lowerings import CUDA, LOWERINGS
from dispc.model.published import open_checkpoint
from dispc.support.errors import first_line

SPEEDUP_GOAL, RATE_GOAL = 1.9, 0.85
GOAL_PRUNED = 50
CUDA_LOWERINGS = ",".join(row.name for row in LOWERINGS.values() if row.runs(CUDA, "float16"))
Found = dict[str, Any]


def run_job(job: Job, work: Path, timeout: float, record: Callable[[Found], None]) -> None:
    """Run a measuring process and record what it prints; planned cells that it does not print become errors."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_cells.py")), json.dumps(asdict(job))]
    missing = [{"runtime": runtime} | asdict(cell) for runtime, cell in job.planned()]
    log = work / "stderr.txt"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):  # libraries may print too
                found = json.loads(line)
                found.pop("job", None)
                record(found)
                missing = [cell for cell in missing if not cell.items() <= found.items()]
        code = process.wait()
        timer.cancel()
    said = (log.read_text(errors="replace").strip().splitlines() or ["nothing on stderr"])[-1]
    for cell in missing:
        record(cell | {"error": f"the process ended with {code}: {said[:300]}"})


def with_speedups(cells: Sequence[Found]) -> list[Found]:
    """The cells, those of pruned models with their speed-up over the same cell of the dense model."""

    def key(cell: Found) -> tuple[Any, ...]:
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


def judge(cells: Sequence[Found], copy_rate: float) -> dict[str, bool]:
    """The goals: decoding at batch 1, half pruned, the fastest ORT row against the fastest dense ORT row."""
    goals = {}
    timed = [c for c in cells if "milliseconds" in c and c["phase"] == "decode" and c["batch"] == 1
             and c["runtime"] in (ORT, CUDA_GRAPH)]  # fmt: skip
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


def table_row(cell: Found, copy_rate: float) -> list[str]:
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


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def run_shape(
    shape: str, percents: Sequence[int], lowerings: Sequence[str], target: str, job: Job, work: Path, timeout: float,
    record: Callable[[Found], None],
) -> None:  # fmt: skip
    """Every model of a shape in every runtime; `job` says what is the same for all of them."""
    model = Path(job.model)
    make_checkpoint(model, shape)
    config = open_checkpoint(model).config
    for percent in percents:
        where: Found = {"shape": shape, "pruned": percent, "lowering": None, "kept": 1.0}
        masks = None
        if percent:
            masks = work / f"{shape}-{percent}.safetensors"
            drawn = learned_like(config, 1 - percent / 100, seed=0)
            drawn.save(masks, config)
            dense = config.block_parameters * config.num_hidden_layers
            where["kept"] = round(drawn.kept_parameters(config) / dense, 4)
        Path(str(job.reference)).unlink(missing_ok=True)
        pytorch = replace(job, masks=str(masks) if masks else None)
        run_job(pytorch, work, timeout, lambda found, where=where: record(where | found))  # type: ignore[misc]
        for lowering in lowerings if percent else (None,):
            artifact, options = work / "artifact", {"lowering": lowering} if lowering else {}
            onnx = replace(pytorch, artifact=str(artifact), runtimes=ONNX_RUNTIME[job.device])
            where = where | {"lowering": lowering}
            try:
                compile_artifact(model, artifact, target, masks, **options)
            except Exception as error:  # one lowering that does not compile leaves the others
                for runtime, cell in onnx.planned():
                    record(where | {"runtime": runtime} | asdict(cell) | {"error": f"compile: {first_line(error)}"})
                continue
            run_job(onnx, work, timeout, lambda found, where=where: record(where | found))  # type: ignore[misc]
            remove(artifact)
    remove(model)


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
    cells: list[Found] = []
    result: Found = {"benchmark": "gpu", "smoke": smoke, "environment": environment(), "device": {}, "cells": cells}
    result |= {"dtype": dtype, "rounds": rounds, "calls": calls}

    def record(found: Found) -> None:
        if "device" in found:
            result["device"] = found["device"]
        else:
            cells.append(found)
            console.print(" | ".join(table_row(found, float("nan"))), found.get("error", ""), found.get("skipped", ""),
                          highlight=False, soft_wrap=True)  # fmt: skip
        write_result(json_file, result | {"cells": with_speedups(cells)})

    for shape in names:
        needed = 4 * sum(math.prod(dimensions) for dimensions in SHAPES[shape].tensors().values())
        if needed > disk_usage(work).free:  # the checkpoint, and an artifact as large
            console.print(f"{shape}: skipped, it needs {needed / 10**9:.0f} GB of disk at {work}", highlight=False)
            result.setdefault("skipped_shapes", []).append(shape)
            continue
        job = Job(
            model=str(work / shape), masks=None, artifact=None, reference=str(work / "reference.npy"),
            runtimes=PYTORCH[device], device=device, dtype=dtype, cells=tuple(planned), rounds=rounds, calls=calls,
        )  # fmt: skip
        run_shape(shape, sorted(numbers(pruned)), lowerings.split(","), target, job, work, timeout, record)

    result["cells"] = with_speedups(cells)
    rate = result["device"].get("copy_gb_per_second", float("nan"))
    result["goals"] = {} if smoke else judge(cells, rate)
    columns = ("", "phase", "batch", "tokens", "median ms", "max ms", "tokens/s", "speed-up", "GB/s", "of copy")
    rows = [table_row(cell, rate) for cell in result["cells"]]
    report(f"{result['device'].get('name')}, {dtype}", (*columns, "indexing"), rows, result["goals"])
    write_result(json_file, result)
    remove(work)


if __name__ == "__main__":
    typer.run(main)
