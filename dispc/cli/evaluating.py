"""The command that measures the quality of a model, of masks or of an artifact: eval."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from dispc.cli.arguments import options_from
from dispc.cli.process import collect_garbage
from dispc.cli.tables import JsonFlag, count_progress, err, eval_table, out, print_json

if TYPE_CHECKING:
    from dispc.evaluate.evaluate import EvalOptions


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """What `dispc eval` takes."""

    path: Annotated[Path, typer.Argument(help="Model directory, or artifact.")]
    data: Annotated[
        list[str] | None, typer.Option(help="Text for perplexity, as for learn; may be given several times.")
    ] = None
    tasks: Annotated[str | None, typer.Option(help="Zero-shot tasks of lm-evaluation-harness, by commas.")] = None
    masks: Annotated[Path | None, typer.Option(help="Judge the model directory under these masks.")] = None
    sequence_length: Annotated[int | None, typer.Option(help="Window.", show_default="2048, or the model's limit")] = (
        None
    )
    max_windows: Annotated[int | None, typer.Option(min=1, help="Read no more windows than this.")] = None
    include: Annotated[Path | None, typer.Option(help="Directory with further task definitions (YAML).")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Read no more items per task than this.")] = None
    device: Annotated[str, typer.Option(help="Where it runs, model or artifact: cpu or cuda.")] = "cpu"
    record: Annotated[bool, typer.Option("--record", help="Write the perplexity into the mask file's metadata.")] = (
        False
    )
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the report to this file too.")] = None

    def options(self) -> "EvalOptions":
        from dispc.evaluate.evaluate import EvalOptions

        tasks = tuple(task.strip() for task in self.tasks.split(",")) if self.tasks else ()
        return options_from(EvalOptions, self, data=tuple(self.data or ()), tasks=tasks)


def evaluate(arguments: EvalArguments, as_json: JsonFlag = False) -> None:
    """Perplexity and zero-shot accuracy of a dense model, of its masked reference, or of an artifact.

    Example: [bold]dispc eval model/ --masks masks.safetensors --data wiki.test.raw[/bold]
    """
    from dispc.evaluate.evaluate import evaluate
    from dispc.manifest import MANIFEST

    options = arguments.options()
    collect_garbage()
    report = evaluate(options, lambda what: count_progress(err, what))
    unused = options.path / "masks.safetensors"
    if options.masks is None and unused.is_file() and not (options.path / MANIFEST).is_file():
        note = f"note: this is the dense model; --masks {unused} measures the pruned one"
        err.print(escape(note), highlight=False, soft_wrap=True)
    if as_json:
        print_json(report.as_dict())
    else:
        out.print(eval_table(report))
