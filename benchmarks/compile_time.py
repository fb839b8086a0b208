"""Whole-process compile time of a small model, against onnxruntime-genai's model builder in the same run.

    .venv/bin/python benchmarks/compile_time.py --model SMOLLM2_DIR \\
        --builder-python OTHER_VENV/bin/python --json benchmarks/results/compile_time.json

SMOLLM2_DIR is a Hugging Face directory of SmolLM2-135M; OTHER_VENV has transformers 5 and onnxruntime-genai, which the
builder needs. The rows alternate; each measurement is a fresh process, and its output is deleted:

- dispc, half pruned: `dispc compile --no-validate`, onnx-cpu, float32, random masks that keep half
  of the block parameters
- dispc, dense: the same with `--dense`, so that as many bytes are written as the builder writes
- builder: `python -m onnxruntime_genai.models.builder -p fp32 -e cpu`

The page cache is warm: the first round is not counted.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from common import WORK, Run, dispc, make_masks, remove, report, run, summary, write_result
from machine import environment, load
from make_checkpoint import make_checkpoint


def main(
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory of the model.")] = None,
    builder_python: Annotated[Path | None, typer.Option(help="Python that has the builder.")] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for what is written.")] = WORK / "compile_time",
    smoke: Annotated[bool, typer.Option(help="One round, a tiny model by default: does it run?")] = False,
) -> None:
    """Compile time against onnxruntime-genai's builder."""
    work.mkdir(parents=True, exist_ok=True)
    if model is None and (builder_python or not smoke):
        raise typer.BadParameter("--model is needed: the tiny model of --smoke has no tokenizer for the builder")
    if model is None:
        model = work / "tiny"
        make_checkpoint(model, "tiny")
    if smoke:
        rounds = 1
    masks, out = work / "masks.safetensors", work / "out"
    make_masks(model, masks)
    compile_command = dispc("compile", model, "--target", "onnx-cpu", "-o", out, "--no-validate")
    commands: dict[str, list[str | Path]] = {
        "dispc, half pruned": [*compile_command, "--masks", masks],
        "dispc, dense": [*compile_command, "--dense"],
    }
    if builder_python is not None:
        builder: list[str | Path] = [builder_python, "-m", "onnxruntime_genai.models.builder"]
        builder += ["-p", "fp32", "-e", "cpu", "-c", work / "cache", "-i", model, "-o", out]
        commands["builder"] = builder

    result: dict[str, Any] = {"benchmark": "compile_time", "model": str(model), "smoke": smoke}
    result["environment"] = environment()
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    written: dict[str, int] = {}
    for number in range(rounds + (0 if smoke else 1)):
        for name, command in commands.items():
            remove(out)
            done = run(command)
            written[name] = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
            if smoke or number:
                runs[name].append(done)
    result["load_after"] = load()
    remove(work)

    rows = []
    for name, found in runs.items():
        seconds = summary([one.seconds for one in found])
        result[name] = {
            "command": " ".join(str(word) for word in commands[name]),
            "seconds": seconds,
            "cpu_seconds": summary([one.user_seconds + one.system_seconds for one in found]),
            "peak_bytes": max(one.peak_bytes for one in found),
            "written_bytes": written[name],
        }
        rows.append(
            [
                name,
                *(f"{seconds[key]:.2f}" for key in ("median", "min", "max")),
                f"{result[name]['cpu_seconds']['median']:.2f}",
                f"{result[name]['peak_bytes'] / 2**20:.0f}",
                f"{written[name] / 10**6:.0f}",
            ]
        )
    goals: dict[str, bool] = {}
    if builder_python is not None:
        ours, theirs = (result[name]["seconds"]["median"] for name in ("dispc, half pruned", "builder"))
        result["ratio"] = round(ours / theirs, 3)
        result["ratio_dense"] = round(result["dispc, dense"]["seconds"]["median"] / theirs, 3)
        if not smoke:
            goals[f"dispc takes {result['ratio']:.2f} times as long as the builder (goal 1.00)"] = ours <= theirs
    result["goals"] = goals
    columns = ("", "median s", "min s", "max s", "CPU s", "peak MiB", "written MB")
    report(f"compile, whole process, {rounds} rounds", columns, rows, goals)
    write_result(json_file, result)


if __name__ == "__main__":
    typer.run(main)
