"""Milliseconds per decoded token on the CPU, batch 1, half pruned against dense; and what the bytes would allow.

    .venv/bin/python benchmarks/cpu_decode.py --model SMOLLM2_DIR \\
        --builder-python OTHER_VENV/bin/python --json benchmarks/results/cpu_decode.json
    .venv/bin/python benchmarks/cpu_decode.py --shape 7b-4 --builder-python OTHER_VENV/bin/python
    .venv/bin/python benchmarks/cpu_decode.py --model SMOLLM2_DIR --quantize int4 --builder-python ...
    .venv/bin/python benchmarks/cpu_decode.py --model SMOLLM2_DIR --lowering canonical

SMOLLM2_DIR is a Hugging Face directory of SmolLM2-135M; `7b-4` is four blocks of LLaMA-2-7B with random weights, and
needs about 16 GB of memory; OTHER_VENV has transformers 5 and onnxruntime-genai, which the builder wants. Rows, all in
one process with the same session options and threads, measured in turn, round after round:

- builder, dense: the graph of `python -m onnxruntime_genai.models.builder -p fp32 -e cpu` (int4 with --quantize)
- dispc, dense and dispc, pruned: `dispc compile` for onnx-cpu
- PyTorch, pruned: the paper's Algorithm 1 (float32 only)

One call is one token behind `past` tokens that are in the caches: it always does the same work. Choosing the next token
is not part of it. Speed-up is over the faster dense graph; bytes are what a step reads: all weights but the embedding,
of which one row, and the caches.
"""

import statistics
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import WORK, alternate, median_ratio, remove, report, summary, write_result
from contenders import (
    BUILDER,
    DENSE,
    PRUNED,
    BuilderOption,
    Contenders,
    LoweringOption,
    MasksOption,
    ModelOption,
    ShapeOption,
    begin,
)
from machine import load

GOALS = {"small": {64: 0.97, 512: 0.95}, "7b-4": {64: 0.97, 512: 0.97}, "int4": {64: 0.90, 512: 0.90}}
"""Share of the ratio of bytes that the speed-up reaches, by what is measured and by the tokens in the caches."""


def measure(contenders: Contenders, past: int, rounds: int, calls: int, goal: float) -> dict[str, Any]:
    """Everything about decoding behind `past` tokens."""
    runs = {}
    for name, model in contenders.models.items():
        model.allocate(1, past + 1)
        runs[name] = model.bind(np.array([[7]]), past).run
    times = alternate(runs, rounds, calls)
    read = {name: model.bytes_read(1, past) for name, model in contenders.models.items()}
    found: dict[str, Any] = {
        name: {"milliseconds": summary(values), "bytes_read": read[name]} for name, values in times.items()
    }
    goals: dict[str, bool] = {}
    fastest = min(contenders.dense, key=lambda name: statistics.median(times[name]))
    found["fastest_dense"] = fastest
    for name in contenders.models:
        found[name]["speedup"] = round(median_ratio(times[fastest], times[name]), 3)
    speedup, ratio = found[PRUNED]["speedup"], read[fastest] / read[PRUNED]
    found |= {"bytes_ratio": round(ratio, 3), "speedup_over_bytes_ratio": round(speedup / ratio, 3)}
    said = f"past {past}: {speedup:.2f} times as fast as {fastest}, {speedup / ratio:.2f} of the bytes' {ratio:.2f}"
    goals[f"{said} (goal {goal:.2f})"] = speedup >= goal * ratio
    if BUILDER in times:
        dense = found["dense_over_builder"] = round(median_ratio(times[BUILDER], times[DENSE]), 3)
        goals[f"past {past}: {DENSE}, {dense:.2f} times as fast as {BUILDER} (goal 1.00)"] = dense >= 1
    return found | {"goals": goals}


def main(
    model: ModelOption = None,
    shape: ShapeOption = None,
    masks: MasksOption = None,
    lowering: LoweringOption = None,
    builder_python: BuilderOption = None,
    quantize: Annotated[str | None, typer.Option(help="int4: both sides with 4-bit weights.")] = None,
    pasts: Annotated[str, typer.Option(help="Numbers of tokens in the caches.")] = "64,512",
    threads: Annotated[int, typer.Option(help="Threads within a node, of ONNX Runtime and of PyTorch.")] = 2,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 9,
    calls: Annotated[int, typer.Option(help="Counted tokens per round and row.")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for what is written.")] = WORK / "cpu_decode",
    smoke: Annotated[bool, typer.Option(help="Tiny model, one round: does it run?")] = False,
) -> None:
    """Decoding on the CPU: half pruned against dense."""
    if smoke:
        pasts, rounds, calls = "8,16", 1, 2
    result, contenders = begin(
        "cpu_decode", model=model, shape=shape, masks=masks, lowering=lowering, builder_python=builder_python,
        quantize=quantize, threads=threads, rounds=rounds, calls=calls, work=work, smoke=smoke,
    )  # fmt: skip
    wanted = GOALS["int4" if quantize else "7b-4" if shape == "7b-4" else "small"]
    rows, goals = [], {}
    for past in (int(past) for past in pasts.split(",")):
        found = result[f"past_{past}"] = measure(
            contenders, past, rounds, calls, wanted.get(past, min(wanted.values()))
        )
        goals |= found["goals"]
        for name in contenders.models:
            row = found[name]
            milliseconds = [f"{row['milliseconds'][key]:.2f}" for key in ("median", "min", "max")]
            speedup = f"{row['speedup']:.2f}"
            rate = row["bytes_read"] / row["milliseconds"]["median"] / 10**6
            rows.append([name, str(past), *milliseconds, speedup, f"{row['bytes_read'] / 1e6:.1f}", f"{rate:.1f}"])
    result["load_after"] = load()
    del contenders
    remove(work)
    result["goals"] = {} if smoke else goals
    columns = ("", "past", "median ms", "min ms", "max ms", "speed-up", "MB read", "GB/s")
    what = f"{result['model']}, {quantize or 'float32'}, {result['lowering']}, {100 * result['kept']:.1f} % kept"
    report(f"{what}, {threads} threads, {rounds} rounds", columns, rows, result["goals"])
    write_result(json_file, result)


if __name__ == "__main__":
    typer.run(main)
