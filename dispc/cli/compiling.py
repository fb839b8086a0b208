"""The command that compiles: compile."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from dispc.algorithms import ALGORITHMS, NEAREST
from dispc.cli.arguments import options_from
from dispc.cli.process import SETTINGS, import_transformers
from dispc.cli.tables import JsonFlag, err, out, print_error, print_json
from dispc.lowerings import LOWERINGS
from dispc.support.files import real

if TYPE_CHECKING:
    from dispc.compiler import CompileOptions
    from dispc.quantisation import Quantisation

Force = Annotated[bool, typer.Option("--force", help="Replace an older artifact at the output path.")]


@dataclass(frozen=True, kw_only=True)
class QuantisationArguments:
    """The options of weight-only quantisation."""

    quantize: Annotated[str | None, typer.Option(help="Store weights as integers: int4 or int8.")] = None
    block_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 16, 32, ... 256.", show_default="32")
    ] = None
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="A zero point per block of weights.")] = False
    quantize_head: Annotated[bool, typer.Option("--quantize-head", help="Quantise the LM head too.")] = False
    quantize_embedding: Annotated[bool, typer.Option("--quantize-embedding", help="And the token embedding.")] = False
    int8_activations: Annotated[
        bool | None, typer.Option(help="onnx-cpu: multiply in int8 (int8 weights: the default).")
    ] = None
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="How int4 weights are rounded: "
            + "; ".join(f"{row.name} ({row.label})" for row in ALGORITHMS.values())
            + ".",
            show_default=NEAREST,
        ),
    ] = None
    mixed: Annotated[
        str | None,
        typer.Option(help="Keep some products in int8, 15 % more bytes: chosen by widths, or by measured damage."),
    ] = None
    data: Annotated[
        str | None, typer.Option(help="Text for --algorithm gptq and --mixed damage, as `dispc learn` takes it.")
    ] = None

    def quantisation(self, target: str) -> "Quantisation | None":
        """None without --quantize.

        Raises:
            CompileError: as `make_quantisation` does.
        """
        from dispc.quantisation import make_quantisation

        return make_quantisation(
            self.quantize,
            target,
            block_size=self.block_size,
            asymmetric=self.asymmetric,
            head=self.quantize_head,
            embedding=self.quantize_embedding,
            int8_activations=self.int8_activations,
            algorithm=self.algorithm,
            mixed=self.mixed,
        )


@dataclass(frozen=True, kw_only=True)
class CompileArguments:
    """What `dispc compile` takes."""

    model: Annotated[Path, typer.Argument(help="Hugging Face model directory.")]
    target: Annotated[str, typer.Option("--target", "-t", help="onnx-cuda, onnx-cpu, or onnx (standard operators).")]
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Artifact directory.", show_default="MODEL-TARGET")
    ] = None
    masks: Annotated[Path | None, typer.Option(help="Mask file.", show_default="MODEL/masks.safetensors")] = None
    dense: Annotated[bool, typer.Option("--dense", help="Compile the whole model, without masks.")] = False
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32.", show_default="by target")] = None
    padding: Annotated[str | None, typer.Option(help="Side on which batches are padded: left or right.")] = None
    lowering: Annotated[
        str | None,
        typer.Option(
            help="How subsets are read and written: "
            + "; ".join(f"{row.name} ({row.label})" for row in LOWERINGS.values())
            + ".",
            show_default="feature-extractor for onnx-cpu, else inverse-gather",
        ),
    ] = None
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose lowering and zero-filled sets by timing on this machine.")
    ] = False
    align: Annotated[
        int | None,
        typer.Option(
            help="Pad widths with zeros to a multiple of this (8, 16, 64; 1: not at all).",
            show_default="onnx-cuda: 8 in half precision, 32 with int4; else 1",
        ),
    ] = None
    last_logits: Annotated[
        bool, typer.Option("--last-logits", help="Logits of each row's last token only (for generation).")
    ] = False
    no_cuda_graph: Annotated[
        bool, typer.Option("--no-cuda-graph", help="Do not ask applications to capture a CUDA graph.")
    ] = False
    without: Annotated[str | None, typer.Option(help="Fusing passes to leave out, by commas.")] = None
    quantised: QuantisationArguments
    force: Force = False
    dump_ir: Annotated[Path | None, typer.Option(help="Write the graph after each pass into this directory.")] = None
    verify_each: Annotated[bool, typer.Option("--verify-each", help="Run the model after each pass.")] = False
    no_validate: Annotated[bool, typer.Option("--no-validate", help="Skip the parity check at the end.")] = False

    @property
    def directory(self) -> Path:
        """Where the artifact goes."""
        return self.output or real(self.model).parent / f"{real(self.model).name}-{self.target}"

    def options(self) -> "CompileOptions":
        from dispc.compiler import CompileOptions

        return options_from(
            CompileOptions,
            self,
            output=self.directory,
            cuda_graph=not self.no_cuda_graph,
            without=tuple(self.without.split(",")) if self.without else (),
            quantisation=self.quantised.quantisation(self.target),
            validate=not self.no_validate,
            data=self.quantised.data,
        )


def compile(arguments: CompileArguments, as_json: JsonFlag = False) -> None:
    """Compile a model and its masks into an ONNX artifact.

    Example: [bold]dispc compile model/ --masks masks.safetensors --target onnx-cuda -o model-cuda/[/bold]
    """
    from dispc.cli.checks import check_lines
    from dispc.cli.tables import compile_progress, compile_tables
    from dispc.compiler import ParityFailure, compile_model

    options = arguments.options()
    import_transformers()
    try:
        with compile_progress(err) as progress:
            manifest = compile_model(options, progress)
    except ParityFailure as failure:
        if as_json:
            print_json({"validation": failure.report.as_dict()})
        else:
            out.print(check_lines(failure.report))
        print_error(str(failure))
        raise typer.Exit(1) from failure
    if SETTINGS.debug:
        for line in manifest.not_rewritten:
            err.print(escape(f"not rewritten: {line}"), highlight=False, soft_wrap=True)
    if as_json:
        print_json(manifest.to_json() | {"output": str(options.output)})
        return
    for table in compile_tables(manifest):
        out.print(table)
    if manifest.validation is not None:
        from dispc.validate.report.report import report_of  # slow to import

        out.print(check_lines(report_of(manifest.validation, options.output)))
    for note in manifest.notes:
        out.print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False)
    times = f"compiled in {manifest.compile_seconds:.1f} s"
    if manifest.validation_seconds is not None:
        times += f", validated in {manifest.validation_seconds:.1f} s"
    out.print(f"[bold]{escape(str(options.output))}[/bold] {times}")
