"""Half pruned against dense on the CPU: what cpu_decode.py and prefill.py share.

Each script describes one call in a `Measurement`: what it runs, how much work that is, and the goal.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from common import WORK, console, median_ratio, remove, report, summary, write_result
from contenders import (
    BUILDER,
    DENSE,
    PRUNED,
    PYTORCH,
    TARGET,
    Contender,
    Contenders,
    Setup,
    builder_packages,
    find_model,
    prepare,
)
from machine import environment, load

from dispc.runtime.timing import alternate
from dispc.targets import TARGETS


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of both scripts; each has its own defaults of `rounds` and `calls`."""

    model: Annotated[Path | None, typer.Option(help="Hugging Face directory of a LLaMA model.")] = None
    shape: Annotated[str | None, typer.Option(help="Make a model of random weights instead: tiny, 7b-4.")] = None
    masks: Annotated[Path | None, typer.Option(help="Mask file; else random, half of the block parameters.")] = None
    lowering: Annotated[str | None, typer.Option(help="Of the pruned graph; else that of onnx-cpu.")] = None
    builder_python: Annotated[Path | None, typer.Option(help="Python that has the builder.")] = None
    threads: Annotated[int, typer.Option(help="Threads within a node, of ONNX Runtime and of PyTorch.")] = 2
    rounds: Annotated[int, typer.Option(help="Counted rounds.")]
    calls: Annotated[int, typer.Option(help="Counted calls per round and row.")]
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None
    work: Annotated[Path | None, typer.Option(help="Folder for what is made; else benchmarks/work/NAME.")] = None
    smoke: Annotated[bool, typer.Option(help="Tiny model, one round: does it run?")] = False


@dataclass(frozen=True, kw_only=True)
class Work:
    """The unit of work of a call: the bytes that it must read, or its floating-point operations."""

    name: str
    """`bytes` or `operations`, as in `bytes_ratio` of the result."""
    key: str
    """Its key in a row of the result."""
    unit: str
    scale: float
    rate: str
    """10^9 of them per second."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one call is, how much work it does, and the goal: a share of the ratio of work, dense over pruned."""

    benchmark: str
    title: str
    size: str
    """What the sizes are, `past` or `length`: results have keys like `past_64`."""
    work: Work
    start: Callable[[Contender, int], Callable[[], None]]
    """(model, size) -> the call to time, whose buffers are ready."""
    count: Callable[[Contenders, str, int], int]
    """(contenders, name of one, size) -> the work of its call."""
    goal: Callable[[int], float]
    """Size -> the share of that ratio that the speed-up must reach."""
    warmup_calls: int
    keep_up_with_builder: bool
    """Whether the dense graph must be as fast as the builder's."""
    quantize: str | None = None
    last_logits: bool = False


def compare(measurement: Measurement, options: Options, sizes: Sequence[int]) -> None:
    """Time all contenders at each size, print the table and the goals, and write the result.

    Raises:
        BenchmarkError, typer.BadParameter: as `prepare` and `find_model` do.
    """
    if options.smoke and options.model is None:
        options = replace(options, shape="tiny")
    work = options.work or WORK / measurement.benchmark
    work.mkdir(parents=True, exist_ok=True)
    result = describe(measurement, options)
    contenders = prepare(setup(measurement, options, work))
    result |= describe_model(contenders, options)
    rows: list[list[str]] = []
    goals: dict[str, bool] = {}
    for size in sizes:
        found = measure(measurement, contenders, size, options)
        result[f"{measurement.size}_{size}"] = found
        goals |= found["goals"]
        rows += [table_row(measurement, name, size, found[name]) for name in contenders.models]
    result["load_after"] = load()
    del contenders
    remove(work)
    result["goals"] = {} if options.smoke else goals
    columns = ("", measurement.size, "median ms", "min ms", "max ms", "speed-up")
    title = f"{result['model']}, {measurement.title}, {result['lowering']}, {100 * result['kept']:.1f} % kept"
    title += f", {options.threads} threads, {options.rounds} rounds"
    report(title, (*columns, measurement.work.unit, measurement.work.rate), rows, result["goals"])
    write_result(options.json_file, result)


def describe(measurement: Measurement, options: Options) -> dict[str, Any]:
    """What is measured and on which machine; prints a warning when the working tree differs from the revision."""
    result: dict[str, Any] = {
        "benchmark": measurement.benchmark,
        "quantize": measurement.quantize,
        "lowering": options.lowering or TARGETS[TARGET].lowering,
        "threads": options.threads,
        "rounds": options.rounds,
        "calls": options.calls,
        "smoke": options.smoke,
        "environment": environment(),
        "builder_packages": builder_packages(options.builder_python),
        "last_logits": measurement.last_logits,
    }
    if changed := result["environment"]["dispc_changed_files"]:
        console.print(f"WARNING: {changed} files of dispc differ from the revision that the result will name")
    return result


def describe_model(contenders: Contenders, options: Options) -> dict[str, Any]:
    """Model, masks, the share of block parameters kept, and the differences of logits."""
    config = contenders.checkpoint.config
    kept = contenders.masks.kept_parameters(config) / config.all_block_parameters
    return {
        "model": options.shape or contenders.checkpoint.directory.name,
        "masks": options.masks.name if options.masks else "random",
        "kept": round(kept, 4),
        "logit_differences": contenders.differences,
    }


def setup(measurement: Measurement, options: Options, work: Path) -> Setup:
    """What to compile."""
    return Setup(
        model=find_model(options.model, options.shape, work),
        masks=options.masks,
        work=work,
        threads=options.threads,
        builder_python=options.builder_python,
        quantize=measurement.quantize,
        lowering=options.lowering,
        last_logits=measurement.last_logits,
    )


def measure(measurement: Measurement, contenders: Contenders, size: int, options: Options) -> dict[str, Any]:
    """Times, work and speed-up of every contender at one size, over the faster dense graph; and the goals.

    The graphs take turns; PyTorch comes after them. Its threads spin for a while after each call: in turns with it the
    pruned graph took 17 ms for a token, without it 14.
    """
    runs = {name: measurement.start(model, size) for name, model in contenders.models.items()}
    graphs, torch = ({name: runs[name] for name in runs if (name == PYTORCH) == apart} for apart in (False, True))
    times: dict[str, list[float]] = {}
    for turns in (graphs, torch):
        times |= alternate(turns, options.rounds, options.calls, warmup_calls=measurement.warmup_calls)
    fastest = min(contenders.dense, key=lambda name: statistics.median(times[name]))
    work = {name: measurement.count(contenders, name, size) for name in contenders.models}
    found: dict[str, Any] = {
        name: {
            "milliseconds": summary(values),
            measurement.work.key: work[name],
            "speedup": round(median_ratio(times[fastest], values), 3),
        }
        for name, values in times.items()
    }
    name, speedup, ratio = measurement.work.name, found[PRUNED]["speedup"], work[fastest] / work[PRUNED]
    found |= {
        "fastest_dense": fastest,
        f"{name}_ratio": round(ratio, 3),
        f"speedup_over_{name}_ratio": round(speedup / ratio, 3),
    }
    goal, case = measurement.goal(size), f"{measurement.size} {size}"
    reached = f"{speedup:.2f} times as fast as {fastest}, {speedup / ratio:.2f} of the {name}' {ratio:.2f}"
    goals = {f"{case}: {reached} (goal {goal:.2f})": speedup >= goal * ratio}
    if measurement.keep_up_with_builder and BUILDER in times:
        dense = found["dense_over_builder"] = round(median_ratio(times[BUILDER], times[DENSE]), 3)
        goals[f"{case}: {DENSE}, {dense:.2f} times as fast as {BUILDER} (goal 1.00)"] = dense >= 1
    return found | {"goals": goals}


def table_row(measurement: Measurement, name: str, size: int, row: Mapping[str, Any]) -> list[str]:
    """One line of the printed table."""
    milliseconds, work = row["milliseconds"], row[measurement.work.key]
    return [
        name,
        str(size),
        *(f"{milliseconds[key]:.2f}" for key in ("median", "min", "max")),
        f"{row['speedup']:.2f}",
        f"{work / measurement.work.scale:.1f}",
        f"{work / milliseconds['median'] / 1e6:.1f}",
    ]
