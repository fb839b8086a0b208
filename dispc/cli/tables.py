"""What the command line shows: progress bars and tables, made from what --json prints."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dispc.cli.heartbeat import heartbeat
from dispc.support.files import json_text
from dispc.support.printable import printable

if TYPE_CHECKING:
    from dispc.demo import DemoResult
    from dispc.evaluate.evaluate import EvalReport
    from dispc.inspect import Inspection
    from dispc.manifest import Manifest

MIB = 2**20


class PlainConsole(Console):
    """A console that spells out control characters in what it is given: names and metadata come from files."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, *what: Any, **options: Any) -> Iterator[Segment]:
        for segment in super().render(*what, **options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


out = PlainConsole(emoji=False)
err = PlainConsole(stderr=True, emoji=False)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def print_json(content: Mapping[str, Any]) -> None:
    """Plain JSON on standard output, whatever the terminal."""
    sys.stdout.write(json_text(content))


LONGEST = 4000
"""Characters of an error's line: a value in it may have any number."""


def print_error(message: str) -> None:
    line = " ".join(part.strip() for part in message.splitlines())
    line = line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    err.print(f"[red]error:[/red] {escape(line)}", highlight=False, soft_wrap=True)


@contextmanager
def compile_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over the bytes of the artifact, elsewhere a heartbeat; the callback takes (what, bytes done, in all)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=1)
        with heartbeat(console, "starting") as beat:

            def update(what: str, done: int, total: int) -> None:
                progress.update(task, description=escape(printable(what)[-48:]), completed=done, total=total)
                beat(f"writing {what}: {done / MIB:,.0f} of {total / MIB:,.0f} MiB" if done else what)

            yield update


@contextmanager
def count_progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over things counted, elsewhere a heartbeat; the callback takes (done, in all)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        with heartbeat(console, what) as beat:

            def update(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)
                beat(f"{what}: {done} of {total}")

            yield update


@contextmanager
def learn_progress(
    console: Console, *, shown: bool = True
) -> Iterator[tuple[Callable[[Mapping[str, float], int], None], Callable[[int, int], None]]]:
    """Loss, share pruned (of `learn`), speed and time left; and what counts the windows that positions are ranked by.

    Where there is no terminal, a line after each hundredth of the steps. Of several processes one has it `shown`.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task("loading", total=None)

        def update(record: Mapping[str, float], steps: int) -> None:
            shown = f"pruned {100 * record['pruned']:.1f} %  " if "pruned" in record else ""
            text = f"loss {record['loss']:.3f}  {shown}{record['tokens_per_second']:,.0f} tokens/s"
            step = int(record["step"])
            progress.update(task, description=text, completed=step, total=steps)
            if not console.is_terminal and step % max(1, steps // 100) == 0:
                console.print(f"step {step} of {steps}: {text}", highlight=False)

        def scoring(done: int, total: int) -> None:
            progress.update(task, description="ranking positions", completed=done, total=total)
            if not console.is_terminal and done % max(1, total // 4) == 0:
                console.print(f"ranking positions: window {done} of {total}", highlight=False)

        yield update, scoring


def eval_table(report: "EvalReport") -> Table:
    """What `dispc eval` measured: perplexity with its protocol, then a row per task."""
    under = f" under {report.masks}" if report.masks else ""
    title = escape(f"{report.model}{under}, {report.dtype}, {report.device}")
    table = Table(title=title, title_justify="left")
    for column in ("measured on", "figure", "", "how"):
        table.add_column(column, justify="right" if column == "figure" else "left")
    for text in report.perplexity:
        how = f"{text.windows} windows of {text.sequence_length}, {text.tokens_scored:,} tokens scored"
        table.add_row(escape(text.data), f"{text.perplexity:.3f}", "perplexity", how)
    for name, task in (report.tasks or {}).items():
        others = "".join(f", {other} {100 * v:.1f} %" for other, v in task.metrics.items() if other != task.metric)
        spread = f"± {100 * task.stderr:.1f}, {task.items} items{others}"
        table.add_row(escape(name), f"{100 * task.value:.1f} %", task.metric, spread)
    return table


def compile_tables(manifest: "Manifest") -> list[Table]:
    """The passes, and what came out."""
    from dispc.manifest import summary

    passes = Table(title=f"{manifest.model_type} for {manifest.target}, {manifest.dtype}", title_justify="left")
    for column in ("pass", "rewrites", "nodes before", "nodes after", "seconds"):
        passes.add_column(column, justify="left" if column == "pass" else "right")
    for record in manifest.passes:
        counts = map(str, (record.rewrites, record.nodes_before, record.nodes_after))
        passes.add_row(escape(str(record)), *counts, f"{record.seconds:.3f}")
    tables = [passes, facts_table(summary(manifest))]
    if tuned := manifest.lowering.tuned:
        blocks = ", ".join(map(str, tuned.blocks))
        times = Table(title=f"blocks {blocks} on {escape(tuned.device)}", title_justify="left")
        for column in ("lowering", "one token, ms", "first token, ms"):
            times.add_column(column, justify="left" if column == "lowering" else "right")
        for name, milliseconds in tuned.milliseconds.items():
            times.add_row(name, f"{milliseconds['one_token']:.3f}", f"{milliseconds['first_token']:.2f}")
        tables.append(times)
    return tables


def facts_table(facts: Mapping[str, str]) -> Table:
    table = Table(show_header=False)
    for name, fact in facts.items():
        table.add_row(escape(name), escape(fact))
    return table


def inspect_tables(inspection: "Inspection", *, ops: bool = False) -> list[Table]:
    """Facts of the whole, widths per block, and operators where the graph is known; with `ops` those of each block."""
    tables = [facts_table({name: str(value) for name, value in inspection.facts.items()})]
    if inspection.widths:
        widths = Table(title="Widths", title_justify="left")
        widths.add_column("block", justify="right")
        for name, full in inspection.full_widths.items():
            widths.add_column(f"{name}\nof {full}", justify="right")
        for number, row in enumerate(inspection.widths):
            widths.add_row(str(number), *(str(row[name]) for name in inspection.full_widths))
        tables.append(widths)
    if inspection.operators:
        operators = Table(title="Operators", title_justify="left")
        operators.add_column("operator")
        operators.add_column("nodes", justify="right")
        for name, count in inspection.operators.items():
            operators.add_row(escape(name), str(count))
        tables.append(operators)
    if ops and inspection.block_operators:
        blocks = Table(title="Operators per block", title_justify="left")
        blocks.add_column("block", justify="right")
        blocks.add_column("operators")
        *rows, outside = inspection.block_operators
        for title, counts in [*((str(index), row) for index, row in enumerate(rows)), ("outside", outside)]:
            blocks.add_row(title, ", ".join(f"{count} {escape(name)}" for name, count in counts.items()))
        tables.append(blocks)
    return tables


def demo_tables(result: "DemoResult") -> list[Table]:
    """What the demo measured, a row per model; and what each answers."""
    slowest = max(model.milliseconds_per_token for model in result.models.values())
    figures = Table(title="SmolLM2-135M-Instruct, onnx-cpu, 2 threads", title_justify="left")
    for column in ("", "size", "one token", "", "perplexity", "parity"):
        figures.add_column(column, justify="right" if column else "left")
    answers = Table(title=escape(result.prompt), title_justify="left", show_header=False, show_lines=True)
    for name, model in result.models.items():
        took = model.milliseconds_per_token
        figures.add_row(
            escape(name),
            f"{model.bytes / MIB:,.0f} MiB",
            f"{took:.1f} ms",
            f"{slowest / took:.2f}x",
            f"{model.perplexity:.2f}",
            "passed" if model.passed else "FAILED",
        )
        answers.add_row(escape(name), escape(model.text.strip()))
    figures.caption = "perplexity: of answers that the dense model gives, held out of learning and recovery"
    return [figures, answers]
