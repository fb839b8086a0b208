"""Does the time to trace and rewrite grow with depth? LLaMA-2-7B's shape with 8 to 80 blocks.

    .venv/bin/python benchmarks/depth.py --json benchmarks/results/depth.json

No weights are written. Every measurement is a fresh process; the depths alternate. Parts, in seconds:

- import: loading Python modules (torch, transformers, onnx_ir, dispc), apart from the rest
- trace, rewrite: `trace()`, with the reading of the safetensors headers, and all passes for onnx-cuda
- again: trace and rewrite a second time in the same process, without the lazy imports of torch.export and transformers
"""

import gc
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from common import WORK, console, report, run, summary, write_result
from machine import environment, load
from make_checkpoint import make_checkpoint

GOAL = 1.20


def measure(directory: Path) -> dict[str, Any]:
    """Trace and rewrite once, and again; runs in the fresh process."""
    start = time.perf_counter()
    import torch

    from dispc.export.trace import trace
    from dispc.masks import Masks
    from dispc.model.published import open_checkpoint
    from dispc.passes.pipeline import build_pipeline, run_pipeline
    from dispc.plan import make_plan

    imported = time.perf_counter()
    masks = Masks.random(open_checkpoint(directory).config, 0.5, 0)  # also warms the import of AutoConfig
    result: dict[str, Any] = {"import": imported - start, "masks": time.perf_counter() - imported}
    plan = make_plan("onnx-cuda")
    for suffix in ("", "_again"):
        if suffix:  # otherwise the first run's garbage is collected during some measurements only
            gc.collect()
            gc.freeze()
        begin = time.perf_counter()
        checkpoint = open_checkpoint(directory)
        model = trace(checkpoint, getattr(torch, plan.dtype))
        traced = time.perf_counter()
        records = run_pipeline(model, build_pipeline(plan, checkpoint, masks))
        end = time.perf_counter()
        result |= {
            f"trace{suffix}": traced - begin,
            f"rewrite{suffix}": end - traced,
            f"total{suffix}": end - begin,
            f"passes{suffix}": {record.name: record.seconds for record in records},
            "nodes": model.graph.num_nodes(),
        }
    return result


def main(
    depths: Annotated[str, typer.Option(help="Numbers of blocks, ascending.")] = "8,16,32,80",
    shape: Annotated[str, typer.Option(help="See make_checkpoint.py.")] = "llama-2-7b",
    rounds: Annotated[int, typer.Option(help="Fresh processes for each depth.")] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for sparse checkpoints.")] = WORK / "depth",
    smoke: Annotated[bool, typer.Option(help="Tiny model, one round: does it run?")] = False,
    child: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time to trace and rewrite for several depths."""
    if child is not None:
        print(json.dumps(measure(child)))
        return
    if smoke:
        depths, shape, rounds = "2,4", "tiny", 1
    numbers = [int(depth) for depth in depths.split(",")]
    directories = {number: work / f"{shape}-{number}" for number in numbers}
    for number, directory in directories.items():
        make_checkpoint(directory, shape, layers=number, sparse=True)
    result: dict[str, Any] = {"benchmark": "depth", "shape": shape, "smoke": smoke}
    result["environment"] = environment()
    runs: dict[int, list[dict[str, Any]]] = {number: [] for number in numbers}
    run([sys.executable, __file__, "--child", directories[numbers[0]]])  # warms the page cache, not counted
    for _ in range(rounds):
        for number, directory in directories.items():
            done = run([sys.executable, __file__, "--child", directory])
            runs[number].append(json.loads(done.output.splitlines()[-1]))
    result["load_after"] = load()
    shutil.rmtree(work, ignore_errors=True)

    parts = ("import", "masks", "trace", "rewrite", "total", "trace_again", "rewrite_again", "total_again")
    rows = []
    for number, found in runs.items():
        result[f"blocks_{number}"] = {part: summary([one[part] for one in found]) for part in parts} | {
            "nodes": found[0]["nodes"],
            "passes": {
                name: round(statistics.median(one["passes_again"][name] for one in found), 4)
                for name in found[0]["passes_again"]
            },
        }
        medians = [result[f"blocks_{number}"][part]["median"] for part in parts if part != "masks"]
        rows.append([str(number), str(found[0]["nodes"]), *(f"{seconds:.3f}" for seconds in medians)])
    shallow, deep = (result[f"blocks_{number}"] for number in (numbers[0], numbers[-1]))
    compared = ("total", "total_again")
    ratios = {part: round(deep[part]["median"] / shallow[part]["median"], 3) for part in compared}
    result["ratio"] = ratios
    columns = ("blocks", "nodes", *(part.replace("_", " ") for part in parts if part != "masks"))
    goal = f"{numbers[-1]} blocks take {ratios['total']:.2f} times as long as {numbers[0]} (goal {GOAL:.2f})"
    result["goals"] = {goal: ratios["total"] <= GOAL}
    report(f"{shape}: seconds to trace and rewrite, median of {rounds}", columns, rows, result["goals"])
    console.print(f"a second time in the same process: {ratios['total_again']:.2f} times", highlight=False)
    write_result(json_file, result)


if __name__ == "__main__":
    typer.run(main)
