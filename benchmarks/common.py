"""Shared by the benchmarks: commands with their time and peak memory, tables of results, JSON files."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dispc.support.files import write_json

GIB = 2**30
WORK = Path(__file__).resolve().parent / "work"
console = Console()


class BenchmarkError(Exception):
    """A measured command failed; the message holds the end of what it printed."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished process. `peak_bytes` is its ru_maxrss: resident memory, mapped files included."""

    seconds: float
    peak_bytes: int
    user_seconds: float
    system_seconds: float
    output: str


def run(command: Sequence[str | Path]) -> Run:
    """Run `command` to its end, from exec to exit, bytecode caches allowed as in a normal installation.

    Keep the caller small: Linux counts the memory of the process that forks in the child's ru_maxrss.

    Raises:
        BenchmarkError: when it exits with anything but 0.
    """
    words = [str(word) for word in command]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    pipe, out = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(words, stdout=pipe, stderr=out, env=environment) as process:
        assert process.stdout is not None
        output = process.stdout.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchmarkError(f"{' '.join(words)}: exit code {process.returncode}\n{output[-2000:]}")
    return Run(
        seconds=seconds,
        peak_bytes=usage.ru_maxrss * 1024,
        user_seconds=usage.ru_utime,
        system_seconds=usage.ru_stime,
        output=output,
    )


def dispc(*arguments: str | Path) -> list[str | Path]:
    """The command line of the dispc beside this Python."""
    return [Path(sys.executable).with_name("dispc"), *arguments]


def json_report(output: str) -> dict[str, Any]:
    """The JSON that `dispc ... --json` printed, whatever progress stands around it."""
    start = f"\n{output}".index("\n{\n")
    report: dict[str, Any] = json.JSONDecoder().raw_decode(output[start:])[0]
    return report


MASKS = """
import sys
from pathlib import Path

from dispc.model.published import open_checkpoint
from dispc.masks import Masks

config = open_checkpoint(Path(sys.argv[1])).config
wanted = config.block_parameters * config.num_hidden_layers / 2
draws = [Masks.random(config, percent / 100, seed) for percent in range(40, 70) for seed in (0, 1)]
best = min(draws, key=lambda masks: abs(masks.kept_parameters(config) - wanted))
best.save(Path(sys.argv[2]), config)
"""
"""Masks.random varies the widths too much to keep exactly half: take the draw that is nearest to it."""


def make_masks(model: Path, path: Path) -> None:
    """Write random masks that keep half of the block parameters of `model`, to within a percent or so.

    In a process of its own: this one stays small (see `run`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-c", MASKS, model, path])


def compile_artifact(model: Path, output: Path, target: str, masks: Path | None, **options: Any) -> None:
    """`dispc compile --no-validate --force` in this process, dense without masks."""
    from dispc.compiler import CompileOptions, compile_model

    compile_model(
        CompileOptions(
            model=model,
            output=output,
            target=target,
            masks=masks,
            dense=masks is None,
            validate=False,
            force=True,
            **options,
        )
    )


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Median of first over second, round by round, so that what slows a whole round down does not count."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def numbers(text: str) -> list[int]:
    """The numbers of an option like `64,512`."""
    return [int(part) for part in text.split(",") if part]


def remove(path: Path) -> None:
    """Delete a directory if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, spread and every single value."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "runs": [round(value, 4) for value in values],
    }


def report(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], goals: Mapping[str, bool]) -> None:
    """Print a table, and below it one line for each goal: reached or not."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for goal, reached in goals.items():
        console.print(f"{'reached' if reached else 'NOT reached'}: {goal}", highlight=False)


def write_result(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, all at once; None writes nothing."""
    if path is not None:
        write_json(path, result)
