"""The command that judges an artifact: validate."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dispc.cli.arguments import options_from
from dispc.cli.checks import check_lines, latency_tables
from dispc.cli.heartbeat import heartbeat
from dispc.cli.process import import_transformers
from dispc.cli.tables import JsonFlag, err, out, print_json
from dispc.support.errors import DispcError

if TYPE_CHECKING:
    from dispc.runtime.latency import LatencyOptions
    from dispc.validate.checks.parity import Thresholds
    from dispc.validate.report.report import Report


@dataclass(frozen=True, kw_only=True)
class ThresholdArguments:
    """The limits of the figures."""

    max_error: Annotated[
        float | None, typer.Option(help="Logit error, in units of the dtype's own.", show_default="4")
    ] = None
    max_kl: Annotated[
        float | None, typer.Option(help="KL divergence, in units of the dtype's own.", show_default="16")
    ] = None
    max_top1: Annotated[
        float | None, typer.Option(help="Share of other top tokens beyond ties.", show_default="0.01")
    ] = None
    max_greedy: Annotated[
        float | None, typer.Option(help="Share of other greedy tokens beyond ties.", show_default="0")
    ] = None
    max_perplexity: Annotated[
        float | None, typer.Option(help="Relative difference of perplexity.", show_default="0.01")
    ] = None

    def thresholds(self) -> "Thresholds":
        from dispc.validate.checks.parity import Thresholds

        limits = {
            "error": self.max_error,
            "kl": self.max_kl,
            "top1": self.max_top1,
            "greedy": self.max_greedy,
            "perplexity": self.max_perplexity,
        }
        return Thresholds(**{name: limit for name, limit in limits.items() if limit is not None})


@dataclass(frozen=True, kw_only=True)
class LatencyArguments:
    """What is timed, and beside what."""

    latency: Annotated[bool, typer.Option("--latency", help="Measure times, memory and operators too.")] = False
    dense: Annotated[Path | None, typer.Option(help="A dense artifact to compare with; implies --latency.")] = None
    build_dense: Annotated[
        bool, typer.Option("--build-dense", help="Compile the dense artifact on the fly; implies --latency.")
    ] = False
    batch: Annotated[list[int] | None, typer.Option(help="Batch size to time; several times.", show_default="1")] = None
    prompt: Annotated[
        list[int] | None, typer.Option(help="Prompt length to time; several times.", show_default="128")
    ] = None
    past: Annotated[list[int] | None, typer.Option(help="Past length to time one token at.", show_default="128")] = None
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed runs of each case.", show_default="20")] = None
    threads: Annotated[
        int | None,
        typer.Option(min=0, max=1024, help="Threads for timing; 0 leaves it to ONNX Runtime.", show_default="0"),
    ] = None

    def options(self) -> "LatencyOptions | None":
        """None where nothing is timed.

        Raises:
            DispcError: for an option that has nothing to act on.
        """
        from dispc.runtime.latency import LatencyOptions

        if self.build_dense:
            refuse_given({"dense": self.dense}, "no --build-dense")
        if not (self.latency or self.dense or self.build_dense):
            timing = {name: getattr(self, name) for name in ("batch", "prompt", "past", "rounds", "threads")}
            refuse_given(timing, "--latency")
            return None
        lengths = {"batches": self.batch, "prompts": self.prompt, "pasts": self.past}
        chosen: dict[str, Any] = {name: tuple(values) for name, values in lengths.items() if values}
        counts = {"rounds": self.rounds, "threads": self.threads}
        chosen |= {name: count for name, count in counts.items() if count is not None}
        return LatencyOptions(**chosen)


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """The files that the report is written to."""

    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the report as JSON.")] = None
    junit: Annotated[Path | None, typer.Option(help="Write the checks as JUnit XML, one test case for each.")] = None
    html: Annotated[Path | None, typer.Option(help="Write the report as one self-contained page.")] = None
    markdown: Annotated[Path | None, typer.Option(help="Write a summary for a CI job.")] = None

    @property
    def paths(self) -> list[Path]:
        return [path for path in (self.json_file, self.junit, self.markdown, self.html) if path]

    def write(self, report: "Report") -> None:
        """Write each file that was asked for; one that cannot be written does not keep the others from it.

        Raises:
            OSError: the first, when all is done.
        """
        from dispc.support.files import json_text, write_text
        from dispc.validate.report.html import page

        texts: tuple[tuple[Path | None, Callable[[], str]], ...] = (
            (self.json_file, lambda: json_text(report.as_dict())),
            (self.junit, report.junit),
            (self.markdown, report.markdown),
            (self.html, lambda: page(report)),
        )
        failures = []
        for path, render in texts:
            try:
                if path:
                    write_text(path, render())
            except OSError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def write_failure(self, artifact: Path, error: Exception) -> None:
        """Write the reports that CI reads where the validation could not run."""
        from dispc.support.files import write_text
        from dispc.validate.report.report import junit_error, markdown_error

        for path, render in ((self.junit, junit_error), (self.markdown, markdown_error)):
            if path:
                write_text(path, render(str(artifact), str(error) or type(error).__name__))


@dataclass(frozen=True, kw_only=True)
class ValidateArguments:
    """What `dispc validate` takes."""

    artifact: Annotated[Path, typer.Argument(help="Artifact directory.")]
    reference: Annotated[Path, typer.Option("--reference", "-r", help="The model it was compiled from.")]
    masks: Annotated[
        Path | None, typer.Option(help="The masks that are meant.", show_default="REFERENCE/masks.safetensors")
    ] = None
    on_cpu: Annotated[bool, typer.Option("--on-cpu", help="Judge parity on the CPU, whatever the target.")] = False
    drill: Annotated[bool, typer.Option("--drill", help="Compare block by block even when nothing failed.")] = False
    data: Annotated[str | None, typer.Option(help="Text for perplexity, as for learn.")] = None
    sequence_length: Annotated[
        int | None, typer.Option(help="Window for perplexity.", show_default="2048, or the limit")
    ] = None
    max_windows: Annotated[int | None, typer.Option(min=1, help="Read no more windows than this.")] = None
    reference_dtype: Annotated[str | None, typer.Option(help="Truth: float64 or float32.", show_default="float64")] = (
        None
    )
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random tokens.")] = 0
    limits: ThresholdArguments
    timing: LatencyArguments
    baseline: Annotated[
        Path | None, typer.Option(help="Fail if any figure is worse than in this report (a --json-file).")
    ] = None
    max_regression: Annotated[str, typer.Option(help="How much worse than --baseline a figure may be.")] = "5%"
    reports: ReportArguments
    verbose: Annotated[bool, typer.Option("--verbose", help="Say what each check was made of, passed or not.")] = False

    @property
    def inputs(self) -> list[Path]:
        data = Path(self.data) if self.data else None
        return [path for path in (self.artifact, self.reference, self.masks, self.timing.dense, data) if path]

    def run(self) -> "Report":
        """Judge the artifact.

        Raises:
            DispcError: when it cannot be judged, or an option has nothing to act on.
        """
        from dispc.validate.judge import check
        from dispc.validate.options import CheckOptions

        latency = self.timing.options()
        if not self.data:
            refuse_given({"sequence-length": self.sequence_length, "max-windows": self.max_windows}, "--data FILE")
        thresholds, regression = self.limits.thresholds(), share(self.max_regression)
        import_transformers()
        with (
            heartbeat(err, "loading") as beat,
            dense_artifact(self.artifact, self.reference, self.timing.dense, self.timing.build_dense) as dense,
            err.status("") as status,
        ):

            def say(what: str) -> None:
                status.update(f"{what} ...")
                beat(what)

            options = options_from(
                CheckOptions,
                self,
                thresholds=thresholds,
                device="cpu" if self.on_cpu else "target",
                drill=self.drill or self.reports.html is not None,
                latency=latency,
                dense=dense,
                max_regression=regression,
            )
            return check(self.artifact, self.reference, options, say=say)


def validate(arguments: ValidateArguments, as_json: JsonFlag = False) -> None:
    """Does the artifact compute what the masked model computes? Exit code 0 passed, 1 failed, 2 could not run.

    Example: [bold]dispc validate model-cuda/ --reference model/ --junit report.xml --html report.html[/bold]
    """
    clear_reports(arguments.reports.paths, arguments.inputs, arguments.baseline)
    try:
        report = arguments.run()
    except Exception as error:  # whatever it is: CI reads the reports
        arguments.reports.write_failure(arguments.artifact, error)
        raise
    if as_json:
        print_json(report.as_dict())
    else:
        out.print(check_lines(report, verbose=arguments.verbose))
        for table in latency_tables(report.latency, report.device):
            out.print(table)
    arguments.reports.write(report)
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
    from dispc.support.files import check_outputs, real

    check_outputs(reports, inputs)
    places = [real(path) for path in reports]
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
        options = CompileOptions(
            model=reference,
            output=path,
            target=manifest.target,
            dense=True,
            validate=False,
            **vars(choices_of(manifest)),
        )
        compile_model(options)
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
