"""A LLaMA-2-7B-shaped checkpoint (13.5 GB) pruned by half for onnx-cuda: peak memory, and time against `dd`.

    .venv/bin/python benchmarks/compile_large.py --json benchmarks/results/compile_large.json

Needs 28 GB of disk under --work; the checkpoint is made when it is missing, and kept. Each round measures, in this
order and each from a cold page cache (sync, then /proc/sys/vm/drop_caches, where permitted):

- read: `dd if=SHARD of=/dev/null bs=16M` for every shard
- write: `dd if=/dev/zero of=FILE bs=16M conv=fdatasync`, 6.8 GB
- compile: `dispc compile --target onnx-cuda --no-validate`, whole process, then fsync of what it wrote

The time of `dd` includes the flush to disk, so the goal is judged by the time of compiling with the flush; the time
without it is given too. Peak memory is ru_maxrss of the compiling process.
"""

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from common import GIB, WORK, Run, console, dispc, make_masks, remove, report, run, summary, write_result
from machine import environment, load
from make_checkpoint import make_checkpoint

WRITTEN_BYTES = 6_800_000_000
PEAK_GOAL, TIME_GOAL = 2.0, 2.0


def drop_caches() -> bool:
    """Flush and drop the page cache; False where this is not permitted."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def flush(directory: Path) -> float:
    """Seconds until every file in `directory` is on disk."""
    start = time.perf_counter()
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def main(
    shape: Annotated[str, typer.Option(help="See make_checkpoint.py.")] = "llama-2-7b",
    layers: Annotated[int | None, typer.Option(help="Number of blocks, instead of the shape's.")] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for checkpoint and output.")] = WORK / "large",
    smoke: Annotated[bool, typer.Option(help="Tiny model, one round: does it run?")] = False,
) -> None:
    """Compile a large checkpoint; compare with dd."""
    if smoke:
        shape, rounds = "tiny", 1
    model, masks, out = work / f"{shape}-{layers or 'all'}", work / "masks.safetensors", work / "out"
    if not (model / "config.json").is_file():
        console.print(f"making {model} ...")
        make_checkpoint(model, shape, layers=layers)
    shards = sorted(model.glob("*.safetensors"))
    stored = sum(shard.stat().st_size for shard in shards)
    write_bytes = WRITTEN_BYTES if shape == "llama-2-7b" and layers is None else stored // 2
    make_masks(model, masks)
    command = dispc("compile", model, "--masks", masks, "--target", "onnx-cuda", "-o", out, "--no-validate")
    blocks = max(1, write_bytes // 2**24)
    filler = work / "dd.out"
    dd = ["dd", "bs=16M"]
    dd_write = [*dd, "if=/dev/zero", f"of={filler}", f"count={blocks}", "conv=fdatasync"]

    result: dict[str, Any] = {"benchmark": "compile_large", "shape": shape, "layers": layers, "smoke": smoke}
    result["environment"] = environment()
    cold = True
    names = ("read", "write", "dd", "compile", "compile and flush")
    times: dict[str, list[float]] = {name: [] for name in names}
    compiles: list[Run] = []
    for _ in range(rounds):
        remove(out)
        cold = drop_caches() and cold
        times["read"].append(sum(run([*dd, f"if={shard}", "of=/dev/null"]).seconds for shard in shards))
        cold = drop_caches() and cold
        times["write"].append(run(dd_write).seconds)
        filler.unlink()
        times["dd"].append(times["read"][-1] + times["write"][-1])
        cold = drop_caches() and cold
        compiles.append(run(command))
        times["compile"].append(compiles[-1].seconds)
        times["compile and flush"].append(compiles[-1].seconds + flush(out))
    parameters = json.loads((out / "dispc.json").read_text())["block_parameters"]
    written = sum(file.stat().st_size for file in out.iterdir())
    result["load_after"] = load()
    remove(out)
    masks.unlink()
    if smoke:
        remove(work)

    result |= {name: summary(values) for name, values in times.items()}
    result["page_cache"] = "dropped before every measurement" if cold else "NOT dropped (not permitted)"
    result["cpu_seconds"] = summary([one.user_seconds + one.system_seconds for one in compiles])
    result |= {"read_bytes": stored, "dd_written_bytes": blocks * 2**24, "artifact_bytes": written}
    result["block_parameters_kept"] = round(parameters["kept"] / parameters["dense"], 4)
    peak = max(one.peak_bytes for one in compiles) / GIB
    ratio, unflushed = (result[name]["median"] / result["dd"]["median"] for name in reversed(names[3:]))
    result |= {"peak_gib": round(peak, 3), "ratio": round(ratio, 3)}
    result["ratio_without_flush"] = round(unflushed, 3)
    goals = {
        f"peak memory {peak:.2f} GiB (goal {PEAK_GOAL:.1f})": peak <= PEAK_GOAL,
        f"compile and flush take {ratio:.2f} times as long as dd (goal {TIME_GOAL:.1f})": ratio <= TIME_GOAL,
    }
    if smoke:  # there is nothing to see but the start-up time
        goals.clear()
    result["goals"] = goals
    moved = {"read": stored, "write": blocks * 2**24, "dd": stored + blocks * 2**24}
    rows = []
    for name in names:
        seconds = result[name]
        rate = moved.get(name, stored + written) / 10**9 / seconds["median"]
        rows.append([name, *(f"{seconds[key]:.1f}" for key in ("median", "min", "max")), f"{rate:.2f}"])
    title = f"{model.name}: {stored / 10**9:.1f} GB in, {written / 10**9:.1f} GB out, {rounds} rounds"
    report(title, ("", "median s", "min s", "max s", "GB/s"), rows, goals)
    cache = result["page_cache"]
    console.print(f"page cache {cache}; without the flush {unflushed:.2f} times", highlight=False)
    write_result(json_file, result)


if __name__ == "__main__":
    typer.run(main)
