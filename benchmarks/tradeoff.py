"""Perplexity against milliseconds per token and against megabytes: dense and pruned SmolLM2 in several formats.

    .venv/bin/python benchmarks/tradeoff.py make MODEL --masks DIR --adapters DIR --data wiki.valid.raw --work WORK \\
        --builder-python PYTHON
    .venv/bin/python benchmarks/tradeoff.py judge --work WORK --test wiki.test.raw --windows 16
    .venv/bin/python benchmarks/tradeoff.py clock --work WORK
    .venv/bin/python benchmarks/tradeoff.py page

`make` compiles the missing graphs: every model (dense; pruned by DIR/masks-RATIO.safetensors; with adapter-RATIO/ also
recovered) in every format, and with --builder-python the dense graphs of onnxruntime-genai's builder. GPTQ is
calibrated on --data. `judge` measures
the missing perplexities, and `clock` times all graphs alternately in one run; both write
benchmarks/results/tradeoff.json. `page` writes docs/tradeoff.md and docs/tradeoff.png. Perplexities of float32
artifacts are those of their references, which learn_and_recover.py measured (benchmarks/results/recovery.json).
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from common import console, dispc, json_report, remove, run, write_result
from decoder import Decoder, perplexity
from machine import REPOSITORY, environment
from tradeoff_page import write_tradeoff
from turns import time_steps

from dispc.evaluate.perplexity import text_windows
from dispc.learn.recovered import write_pruned
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint

RESULTS = REPOSITORY / "benchmarks" / "results"
FILE = RESULTS / "tradeoff.json"
HEAD = ("--quantize-head", "--quantize-embedding")
INT4 = ("--quantize", "int4", *HEAD, "--int8-activations")
FORMATS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "int8": ("--quantize", "int8", *HEAD),
    "int4": INT4,
    "GPTQ int4": (*INT4, "--algorithm", "gptq", "--asymmetric", "--mixed", "widths"),
}
BUILDER = {"float32": "fp32", "int4": "int4"}
PAST, THREADS = 64, 2
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
WorkOption = Annotated[Path, typer.Option(help="Where models and artifacts are made.")]


@dataclass(frozen=True)
class Point:
    """One graph: of which model (ratio 0 is dense), in which format, by which compiler."""

    ratio: int
    format: str
    recovered: bool = False
    compiler: str = "dispc"

    @property
    def name(self) -> str:
        kind = f"{'recovered' if self.recovered else 'pruned'}-{self.ratio}" if self.ratio else "dense"
        return f"{self.compiler}-{kind}-{self.format.lower().replace(' ', '-')}"

    @property
    def key(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "format": self.format, "recovered": self.recovered, "compiler": self.compiler}


def read() -> dict[str, Any]:
    """The results so far: facts of points by name."""
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"points": {}}
    return found


def note(point: str, **facts: Any) -> None:
    """Add facts about a point to the results."""
    known = read()
    known["points"].setdefault(point, {}).update(facts)
    write_result(FILE, known)


@app.command()
def make(
    model: Annotated[Path, typer.Argument(help="The dense model.")],
    masks: Annotated[Path, typer.Option(help="Directory of masks-RATIO.safetensors.")],
    data: Annotated[Path, typer.Option(help="Calibration text of GPTQ; not the test text.")],
    work: WorkOption,
    adapters: Annotated[Path | None, typer.Option(help="Directory of adapter-RATIO/.")] = None,
    ratios: Annotated[str, typer.Option(help="Per cent, by commas.")] = "20,30,40,50",
    formats: Annotated[str, typer.Option(help="Number formats, by commas.")] = ",".join(FORMATS),
    builder_python: Annotated[Path | None, typer.Option(help="Python that has the builder.")] = None,
) -> None:
    """Compile the missing graphs."""
    work.mkdir(parents=True, exist_ok=True)
    for ratio in (0, *(int(one) for one in ratios.split(","))):
        source = model
        if ratio:
            source = work / f"model-{ratio}"
            adapter = adapters / f"adapter-{ratio}" if adapters else None
            if not source.exists():
                write_pruned(Checkpoint(model), Masks.load(masks / f"masks-{ratio}.safetensors"), adapter, source)
        for format in formats.split(","):
            point = Point(ratio, format, recovered=bool(ratio and adapters))
            options = [*FORMATS[format], *(() if ratio else ("--dense",))]
            compile_point(point, source, work / point.name, options, data)
    if builder_python is not None:
        for format, precision in BUILDER.items():
            build_point(Point(0, format, compiler="builder"), model, work, builder_python, precision)


def compile_point(point: Point, source: Path, out: Path, options: Sequence[str], data: Path) -> None:
    """Compile an artifact and note its size."""
    text = ("--data", str(data)) if "gptq" in options else ()
    if not out.exists():
        console.print(f"{point.name} ...", highlight=False)
        run(dispc("compile", source, "--target", "onnx-cpu", "-o", out, "--no-validate", *options, *text))
    command = " ".join(["dispc compile", source.name, "--target onnx-cpu", *options, *(Path(one).name for one in text)])
    note(point.name, **point.key, bytes=size(out), command=command)


def build_point(point: Point, model: Path, work: Path, python: Path, precision: str) -> None:
    """Let onnxruntime-genai's builder make its dense graph, and note its size."""
    out = work / point.name
    arguments = ["-e", "cpu", "-p", precision]
    if not (out / "model.onnx").exists():
        remove(out)
        console.print(f"{point.name} ...", highlight=False)
        cache = work / "builder-cache"
        run([python, "-m", "onnxruntime_genai.models.builder", *arguments, "-c", cache, "-i", model, "-o", out])
    command = " ".join(["python -m onnxruntime_genai.models.builder", *arguments])
    note(point.name, **point.key, bytes=size(out), command=command)


def size(graph: Path) -> int:
    """Bytes of a graph and its weights."""
    return sum(file.stat().st_size for file in graph.glob("model.onnx*"))


@app.command()
def judge(
    work: WorkOption,
    test: Annotated[Path, typer.Option(help="Text to judge on.")],
    windows: Annotated[int | None, typer.Option(help="So many windows of 1,024; all of 2,048 without.")] = None,
    only: Annotated[str, typer.Option(help="Points to judge, by commas; all, if empty.")] = "",
) -> None:
    """Measure the missing perplexities; those of the builder's graphs in windows of 1,024 only."""
    key = f"{windows} of 1024" if windows else "whole of 2048"
    length = ["--sequence-length", "1024", "--max-windows", str(windows)] if windows else ["--sequence-length", "2048"]
    for name, facts in read()["points"].items():
        if (only and name not in only.split(",")) or key in facts.get("perplexity", {}):
            continue
        if not (work / name).exists() or (facts["compiler"] != "dispc" and not windows):
            continue
        if facts["compiler"] == "dispc":
            output = run(dispc("eval", work / name, "--data", test, *length, "--json")).output
            report = json_report(output)
            measured = round(report["perplexity"][0]["perplexity"], 3)
        else:
            measured = judge_builder(work, name, test, windows or 0)
        console.print(f"{name}: {measured} on {key}", highlight=False)
        note(name, perplexity={**facts.get("perplexity", {}), key: measured})


def judge_builder(work: Path, name: str, test: Path, windows: int) -> float:
    """Perplexity of a graph of the builder, on windows of 1,024 tokens of the dense artifact's tokenizer."""
    dense = work / Point(0, "float32").name
    config = Checkpoint(dense).config
    texts = text_windows(str(test), dense, config.max_positions, 1024)[:windows]
    return perplexity(Decoder(work / name / "model.onnx", config, threads=THREADS), texts)


@app.command()
def clock(
    work: WorkOption,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 7,
    calls: Annotated[int, typer.Option(help="Counted tokens per round and graph.")] = 8,
    formats: Annotated[str, typer.Option(help="Number formats, by commas; all, if empty.")] = "",
) -> None:
    """Time a decoding step of all graphs with 64 tokens in the caches, alternately; older times are dropped."""
    known = read()
    names = []
    for name, facts in known["points"].items():
        facts.pop("milliseconds", None)
        chosen = not formats or facts["format"] in formats.split(",")
        names += [name] if chosen and (work / name / "model.onnx").exists() else []
    graphs = {name: work / name / "model.onnx" for name in names}
    config = work / Point(0, "float32").name
    times = time_steps(graphs, config, past=PAST, threads=THREADS, rounds=rounds, calls=calls)
    for name, values in times.items():
        known["points"][name]["milliseconds"] = round(statistics.median(values), 3)
        known["points"][name]["rounds"] = [round(value, 3) for value in values]
        console.print(f"{name}: {statistics.median(values):.2f} ms", highlight=False)
    known |= {"environment": environment(), "threads": THREADS, "past": PAST, "round_count": rounds, "calls": calls}
    write_result(FILE, known)


@app.command()
def page(
    recovery: Annotated[Path, typer.Option(help="Report of learn_and_recover.py.")] = RESULTS / "recovery.json",
) -> None:
    """Write docs/tradeoff.md and its picture."""
    write_tradeoff(read(), json.loads(recovery.read_text()), REPOSITORY / "docs")


if __name__ == "__main__":
    app()
