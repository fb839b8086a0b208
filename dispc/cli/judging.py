"""The commands that judge: validate, doctor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dispc.cli.tables import JsonFlag, err, out, parity_table, print_json
from dispc.support.errors import DispcError


def validate(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.")],
    reference: Annotated[Path, typer.Option("--reference", "-r", help="The model it was compiled from.")],
    masks: Annotated[
        Path | None, typer.Option(help="The masks that are meant.", show_default="REFERENCE/masks.safetensors")
    ] = None,
    on_cpu: Annotated[bool, typer.Option("--on-cpu", help="Judge parity on the CPU, whatever the target.")] = False,
    drill: Annotated[bool, typer.Option("--drill", help="Compare block by block even when nothing failed.")] = False,
    data: Annotated[str | None, typer.Option(help="Text for perplexity, as for learn.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Window for perplexity.", show_default="2048, or the limit")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Read no more windows than this.")] = None,
    reference_dtype: Annotated[
        str | None, typer.Option(help="Truth: float64 or float32.", show_default="float64 up to a billion parameters")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random tokens.")] = 0,
    max_error: Annotated[
        float | None, typer.Option(help="Logit error, in units of the dtype's own.", show_default="4")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="KL divergence, in units of the dtype's own.", show_default="4")
    ] = None,
    max_top1: Annotated[
        float | None, typer.Option(help="Share of other top tokens beyond ties.", show_default="0.01")
    ] = None,
    max_greedy: Annotated[
        float | None, typer.Option(help="Share of other greedy tokens beyond ties.", show_default="0")
    ] = None,
    max_perplexity: Annotated[
        float | None, typer.Option(help="Relative difference of perplexity.", show_default="0.01")
    ] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Measure times, memory and operators too.")] = False,
    dense: Annotated[Path | None, typer.Option(help="A dense artifact to compare with; implies --latency.")] = None,
    build_dense: Annotated[
        bool, typer.Option("--build-dense", help="Compile the dense artifact on the fly; implies --latency.")
    ] = False,
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch size to time; several times.", show_default="1")
    ] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(help="Prompt length to time; several times.", show_default="128")
    ] = None,
    past: Annotated[
        list[int] | None, typer.Option(help="Past length to time one token at.", show_default="128")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed runs of each case.", show_default="20")] = None,
    threads: Annotated[
        int | None, typer.Option(min=0, help="Threads for timing; 0 leaves it to ONNX Runtime.", show_default="0")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="An earlier report (--json-file) that must not be better.")
    ] = None,
    max_regression: Annotated[str, typer.Option(help="By how much a figure may be worse than --baseline.")] = "5%",
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the report as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the checks as JUnit XML, one test case for each.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one self-contained page.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a summary for a CI job.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Does the artifact compute what the masked model computes? Exit code 0 passed, 1 failed, 2 could not run.

    Example: [bold]dispc validate model-cuda/ --reference model/ --junit report.xml --html report.html[/bold]
    """
    from dispc.runtime.latency import LatencyOptions
    from dispc.support.files import json_text, write_text
    from dispc.validate.checks.parity import Thresholds
    from dispc.validate.judge import check
    from dispc.validate.report.html import page
    from dispc.validate.report.report import junit_error, markdown_error

    limits = {
        "error": max_error, "kl": max_kl, "top1": max_top1, "greedy": max_greedy, "perplexity": max_perplexity
    }  # fmt: skip
    reports = [path for path in (json_file, junit, markdown, html) if path]
    inputs = [path for path in (artifact, reference, masks, dense, Path(data) if data else None) if path]
    clear_reports(reports, inputs, baseline)
    try:
        timed = latency or dense is not None or build_dense
        timing = {"batch": batch, "prompt": prompt, "past": past, "rounds": rounds, "threads": threads}
        windows = {"sequence-length": sequence_length, "max-windows": max_windows}
        for given, needed, dependent in (
            (timed, "--latency", timing), (data, "--data FILE", windows),
            (not build_dense, "no --build-dense", {"dense": dense}),
        ):  # fmt: skip
            if not given:
                refuse_given(dependent, needed)
        options: dict[str, Any] = {
            "thresholds": Thresholds(**{name: limit for name, limit in limits.items() if limit is not None}),
            "device": "cpu" if on_cpu else "target", "drill": drill or html is not None, "data": data,
            "sequence_length": sequence_length, "max_windows": max_windows, "reference_dtype": reference_dtype,
            "seed": seed, "masks": masks, "baseline": baseline, "max_regression": share(max_regression),
        }  # fmt: skip
        if timed:
            fields = {"batches": batch, "prompts": prompt, "pasts": past, "rounds": rounds, "threads": threads}
            chosen: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in fields.items() if value not in (None, [])
            }  # fmt: skip
            options["latency"] = LatencyOptions(**chosen)
        with dense_artifact(artifact, reference, dense, build_dense) as dense_path, err.status("") as status:
            report = check(
                artifact, reference, dense=dense_path, say=lambda what: status.update(f"{what} ..."), **options
            )
    except Exception as error:  # whatever it is: CI reads the reports
        for path, write in ((junit, junit_error), (markdown, markdown_error)):
            if path:
                write_text(path, write(str(artifact), str(error) or type(error).__name__))
        raise
    found = report.as_dict()
    if as_json:
        print_json(found)
    else:
        out.print(parity_table(found))
        for table in latency_tables(found):
            out.print(table)
    texts: tuple[tuple[Path | None, Callable[[], str]], ...] = (
        (json_file, lambda: json_text(found)), (junit, report.junit), (markdown, report.markdown),
        (html, lambda: page(found)),
    )  # fmt: skip
    failures = []
    for path, render in texts:
        try:
            if path:
                write_text(path, render())
        except OSError as error:  # the others are written all the same
            failures.append(error)
    if failures:
        raise failures[0]
    if not report.passed:
        raise typer.Exit(1)


def refuse_given(options: dict[str, Any], needed: str) -> None:
    """Raise DispcError naming the first of `options` that was given: it does nothing without what is `needed`."""
    for name, value in options.items():
        if value is not None:
            raise DispcError(f"--{name} goes with {needed}")


def clear_reports(reports: list[Path], inputs: list[Path], baseline: Path | None) -> None:
    """Remove earlier reports, which would be read as those of this run; a `baseline` may be one that is replaced.

    Raises:
        DispcError: when a report's path is no place for one: a directory, an input or in one, or another report's.
    """
    from dispc.support.files import refuse_inputs

    refuse_inputs(reports, inputs)
    places = [path.resolve() for path in reports]
    for path, place in zip(reports, places, strict=True):
        if place.is_dir():
            raise DispcError(f"{path}: is a directory; name a file in it for the report")
        if places.count(place) > 1:
            raise DispcError(f"{path}: is named for two reports; give each a file of its own")
    for place in places:
        if place.is_file() and not (baseline and baseline.exists() and place.samefile(baseline)):
            place.unlink()


@contextmanager
def dense_artifact(artifact: Path, reference: Path, dense: Path | None, build: bool) -> Iterator[Path | None]:
    """The dense artifact to compare with: the one named, one compiled for this as `artifact` was, or None.

    Raises:
        DispcError: when the one named is not dense, or differs from `artifact` in more than its masks.
    """
    from dispc.manifest import read_manifest, require_comparable

    if dense:
        require_comparable(artifact, dense)
    if dense or not build:
        yield dense
        return
    from dispc.compiler import CompileOptions, compile_model
    from dispc.plan import choices_of

    manifest = read_manifest(artifact)
    with TemporaryDirectory(prefix="dispc-dense-") as scratch:
        path = Path(scratch) / "dense"
        compile_model(CompileOptions(model=reference, output=path, dense=True, validate=False, **choices_of(manifest)))
        yield path


def share(text: str) -> float:
    """`5%` or `0.05` as a share of one.

    Raises:
        DispcError: for anything else.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise DispcError(f"--max-regression {text}: give a share such as 5% or 0.05")
    return value


def latency_tables(report: dict[str, Any]) -> list[Table]:
    """Times of both artifacts, and time by operator type; nothing where nothing was timed."""
    from dispc.validate.report.report import LATENCY_COLUMNS, latency_cells

    latency = report["latency"]
    if latency is None:
        return []
    facts = f"{latency['threads']} threads, {latency['rounds']} runs behind {latency['warmup']}"
    if latency["peak_bytes"]:
        facts += f", peak memory {latency['peak_bytes'] / 2**20:,.0f} MiB"
    facts += f", a copy moves {latency['copy_bytes_per_second'] / 1e9:.1f} GB/s"
    times = Table(title=escape(f"Latency on {report['device']} ({latency['provider']}): {facts}"), title_justify="left")
    for column in ("", "artifact", *LATENCY_COLUMNS):
        times.add_column(column, justify="left" if column in ("", "artifact") else "right")
    for row in latency["rows"]:
        times.add_row(*latency_cells(row, latency))
    gathers = 100 * latency["gather_scatter_share"]
    operators = Table(title=f"Operators while decoding ({gathers:.1f} % Gather and Scatter)", title_justify="left")
    for column in ("operator", "ms", "share"):
        operators.add_column(column, justify="left" if column == "operator" else "right")
    for row in latency["operators"]:
        operators.add_row(row["operator"], f"{row['milliseconds']:.3f}", f"{100 * row['share']:.1f} %")
    return [times, operators]


def doctor(as_json: JsonFlag = False) -> None:
    """Does CUDA work here, and if not, which library is missing and what brings it? Exit code 1 when it does not.

    Example: [bold]dispc doctor[/bold]
    """
    from dispc.runtime.doctor import examine

    diagnosis = examine()
    if as_json:
        print_json(diagnosis.as_dict())
    else:
        table = Table(title="CUDA works" if diagnosis.problem is None else "CUDA does not work", title_justify="left")
        for column in ("", "", "found", "what to do"):
            table.add_column(column)
        for finding in diagnosis.findings:
            mark = "[green]ok[/green]" if finding.ok else "[red]FAIL[/red]"
            table.add_row(escape(finding.name), mark, escape(finding.detail), escape(finding.remedy))
        out.print(table)
        out.print(", ".join(f"{name} {number}" for name, number in diagnosis.versions.items()), highlight=False)
    if diagnosis.problem is not None:
        raise typer.Exit(1)
