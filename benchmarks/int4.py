"""Perplexity and bytes of a model quantised every way, dense and pruned: what each algorithm keeps.

    .venv/bin/python benchmarks/int4.py --model SMOLLM2_DIR --masks smollm2-135m-30.safetensors \\
        --data wiki.valid.raw --test wiki.test.raw --json benchmarks/results/int4.json

Every cell is compiled by `dispc compile` for onnx-cpu, LM head and embedding quantised too as onnxruntime-genai's
builder has them, and read by `dispc eval`; `--only` takes some cells, and adds them to the result that is there.
`--data` is what GPTQ and the measured mixture look at; it must not be the text of the test.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from common import WORK, console, dispc, remove, report, run, write_result
from machine import environment

HEAD = ("--quantize-head", "--quantize-embedding")
INT4 = ("--quantize", "int4", *HEAD)
CELLS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "int8": ("--quantize", "int8", *HEAD),
    "int4": INT4,
    "int4, k_quant": (*INT4, "--algorithm", "k_quant"),
    "int4, hqq": (*INT4, "--algorithm", "hqq"),
    "int4, gptq": (*INT4, "--algorithm", "gptq", "--asymmetric"),
    "int4, mixed by widths": (*INT4, "--mixed", "widths"),
    "int4, mixed by damage": (*INT4, "--mixed", "damage"),
    "int4, gptq, mixed by widths": (*INT4, "--algorithm", "gptq", "--asymmetric", "--mixed", "widths"),
    "int4, gptq, mixed by damage": (*INT4, "--algorithm", "gptq", "--asymmetric", "--mixed", "damage"),
}
TEXT = ("gptq", "damage")
"""Cells with one of these words look at a text."""


def measure(model: Path, masks: Path | None, options: tuple[str, ...], data: Path, test: Path, windows: int,
            work: Path) -> dict[str, Any]:  # fmt: skip
    """Compile one cell and let it read the test: perplexity, bytes, and the products in 8 bits."""
    chosen = ("--masks", masks) if masks else ("--dense",)
    text = ("--data", data) if set(TEXT) & set(options) else ()
    command: list[Any] = [model, "-t", "onnx-cpu", "-o", work / "artifact", *chosen, *options, *text]
    run(dispc("compile", *map(str, command), "--force", "--no-validate"))
    manifest = json.loads((work / "artifact" / "dispc.json").read_text())
    window: list[Any] = ["--sequence-length", 1024, "--max-windows", windows, "--json-file", work / "report.json"]
    run(dispc("eval", *map(str, [work / "artifact", "--data", test, *window])))
    found = json.loads((work / "report.json").read_text())["perplexity"][0]
    return {"perplexity": round(found["perplexity"], 3), "bytes": manifest["bytes"],
            "int8": (manifest["quantisation"] or {}).get("int8", [])}  # fmt: skip


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face directory.")],
    masks: Annotated[Path, typer.Option(help="Mask file of the pruned rows.")],
    data: Annotated[Path, typer.Option(help="Text that quantisation looks at.")],
    test: Annotated[Path, typer.Option(help="Text to read.")],
    only: Annotated[str, typer.Option(help="Cells to measure, by semicolons; all, if empty.")] = "",
    windows: Annotated[int, typer.Option(help="Windows of 1,024 tokens.")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the result goes, and is added to.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for what is written.")] = WORK / "int4",
) -> None:
    """Every cell, dense and pruned."""
    result: dict[str, Any] = {"benchmark": "int4", "windows": windows, "masks": masks.name, "cells": {}}
    if json_file is not None and json_file.exists():
        result = json.loads(json_file.read_text())
    result["environment"] = environment()
    work.mkdir(parents=True, exist_ok=True)
    for name in only.split(";") if only else CELLS:
        cell = result["cells"].setdefault(name, {})
        for which, file in (("dense", None), ("pruned", masks)):
            cell[which] = measure(model, file, CELLS[name], data, test, windows, work)
            console.print(f"{name}, {which}: {cell[which]['perplexity']}", highlight=False)
            write_result(json_file, result)
    remove(work)
    columns = ("", "dense: perplexity", "MB", "pruned: perplexity", "MB")
    rows = [
        [
            name,
            *(text for cell in cells.values() for text in (f"{cell['perplexity']:.2f}", f"{cell['bytes'] / 1e6:.1f}")),
        ]
        for name, cells in result["cells"].items()
    ]
    report(f"{model.name}, {masks.name}", columns, rows, {})


if __name__ == "__main__":
    typer.run(main)
