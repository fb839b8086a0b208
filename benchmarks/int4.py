"""Perplexity, bytes and time of a model in every quantisation, dense and pruned, and of the builder's graphs.

    .venv/bin/python benchmarks/int4.py make --model SMOLLM2_DIR --masks smollm2-135m-30.safetensors \\
        --data wiki.valid.raw --test wiki.test.raw --builder-python OTHER_VENV/bin/python --work WORK
    .venv/bin/python benchmarks/int4.py clock --work WORK

Every cell is compiled by `dispc compile` for onnx-cpu, with LM head and embedding quantised and with int8 activations,
as onnxruntime-genai's builder does. `make` measures the perplexities that are missing in benchmarks/results/int4.json;
`clock` times all graphs alternately in one run. `--data` is the calibration text of GPTQ and of the measured mixture;
it must not be the test text.
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from common import console, dispc, remove, run, write_result
from decoder import Decoder, perplexity
from machine import REPOSITORY, environment
from turns import time_steps

from dispc.evaluate.perplexity import text_windows
from dispc.model.checkpoint import Checkpoint

FILE = REPOSITORY / "benchmarks" / "results" / "int4.json"
HEAD = ("--quantize-head", "--quantize-embedding")
INT4 = ("--quantize", "int4", *HEAD, "--int8-activations")
GPTQ = ("--algorithm", "gptq", "--asymmetric")
CELLS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "int8": ("--quantize", "int8", *HEAD),
    "int4": INT4,
    "int4, k_quant": (*INT4, "--algorithm", "k_quant"),
    "int4, hqq": (*INT4, "--algorithm", "hqq"),
    "int4, gptq": (*INT4, *GPTQ),
    "int4, mixed by widths": (*INT4, "--mixed", "widths"),
    "int4, mixed by damage": (*INT4, "--mixed", "damage"),
    "int4, gptq, mixed by widths": (*INT4, *GPTQ, "--mixed", "widths"),
    "int4, gptq, mixed by damage": (*INT4, *GPTQ, "--mixed", "damage"),
}
TEXT = ("gptq", "damage")
"""Cells with one of these words need a calibration text."""
MIXED = "algo_config=k_quant matmul_mixed_precision=last_matmul:int8,mixed_layers:int8"
BUILDER: dict[str, tuple[str, ...]] = {
    "builder, int4": ("-p", "int4"),
    "builder, int4, k_quant, mixed": ("-p", "int4", "--extra_options", *MIXED.split()),
}
LENGTH, PAST, THREADS = 1024, 64, 2
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
WorkOption = Annotated[Path, typer.Option(help="Where artifacts are kept.")]


def read() -> dict[str, Any]:
    """The results so far: facts of dense and pruned graphs by cell."""
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"benchmark": "int4", "cells": {}}
    return found


def cells(masks: Path, data: Path) -> Iterator[tuple[str, str, tuple[str | Path, ...] | None]]:
    """Name, `dense` or `pruned`, and the options of `dispc compile`; None for graphs of the builder."""
    for name, options in CELLS.items():
        text = ("--data", data) if set(TEXT) & set(options) else ()
        yield name, "dense", ("--dense", *options, *text)
        yield name, "pruned", ("--masks", masks, *options, *text)
    for name in BUILDER:
        yield name, "dense", None


@app.command()
def make(
    model: Annotated[Path, typer.Option(help="Hugging Face directory.")],
    masks: Annotated[Path, typer.Option(help="Mask file of the pruned rows.")],
    data: Annotated[Path, typer.Option(help="Calibration text of quantisation.")],
    test: Annotated[Path, typer.Option(help="Test text.")],
    work: WorkOption,
    builder_python: Annotated[Path | None, typer.Option(help="Python that has the builder.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of 1,024 tokens.")] = 16,
) -> None:
    """Compile the missing graphs and measure their perplexity."""
    work.mkdir(parents=True, exist_ok=True)
    known = read() | {"model": model.name, "masks": masks.name, "windows": windows}
    config = Checkpoint(model).config
    texts = text_windows(str(test), model, config.max_positions, LENGTH)[:windows]
    for name, which, options in cells(masks, data):
        out, facts = directory(work, name, which), known["cells"].setdefault(name, {})
        if options is None and builder_python is None:
            continue
        if not (out / "model.onnx").exists():
            remove(out)
            if options is None:
                command = [builder_python, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-c", work / "cache"]
                run([*map(str, command), *BUILDER[name], "-i", model, "-o", out])
            else:
                run(dispc("compile", model, "-t", "onnx-cpu", "-o", out, "--no-validate", *options))
        if which not in facts:
            size = sum(file.stat().st_size for file in out.glob("model.onnx*"))
            facts[which] = {"perplexity": perplexity(Decoder(out / "model.onnx", config, threads=THREADS), texts)}
            facts[which] |= {"bytes": size, "int8": int8_products(out)}
            console.print(f"{name}, {which}: {facts[which]['perplexity']}, {size / 1e6:.1f} MB", highlight=False)
            write_result(FILE, known)


def directory(work: Path, name: str, which: str) -> Path:
    """Where a cell's artifact lies."""
    return work / f"{name}, {which}".replace(", ", "-").replace(" ", "-")


def int8_products(out: Path) -> list[str]:
    """The products that an artifact of dispc keeps in 8 bits."""
    file = out / "dispc.json"
    quantised = json.loads(file.read_text())["quantisation"] if file.exists() else None
    return list((quantised or {}).get("int8", []))


@app.command()
def clock(
    work: WorkOption,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 9,
    calls: Annotated[int, typer.Option(help="Counted tokens per round and graph.")] = 8,
) -> None:
    """Time a decoding step of all graphs with 64 tokens in the caches, alternately."""
    known = read()
    cells = {f"{name}, {which}": facts for name, both in known["cells"].items() for which, facts in both.items()}
    graphs = {label: directory(work, *label.rsplit(", ", 1)) / "model.onnx" for label in cells}
    config = directory(work, "float32", "dense")
    times = time_steps(graphs, config, past=PAST, threads=THREADS, rounds=rounds, calls=calls)
    for label, values in times.items():
        cells[label]["milliseconds"] = round(statistics.median(values), 3)
        console.print(f"{label}: {statistics.median(values):.2f} ms", highlight=False)
    known |= {"environment": environment(), "threads": THREADS, "past": PAST, "rounds": rounds, "calls": calls}
    write_result(FILE, known)


if __name__ == "__main__":
    app()
