"""The commands that make masks: learn, import-masks."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dispc.cli.arguments import options_from
from dispc.cli.process import collect_garbage
from dispc.cli.tables import JsonFlag, count_progress, err, facts_table, learn_progress, out, print_json
from dispc.support.errors import DataError, LearnError
from dispc.support.extras import need

if TYPE_CHECKING:
    from dispc.learn.instant import Method
    from dispc.learn.options import LearnOptions
    from dispc.masks import Masks

Data = Annotated[
    str | None,
    typer.Option(help="Text, JSON lines or parquet file, or a dataset: OWNER/NAME, OWNER/NAME/CONFIG, or with :SPLIT."),
]
Ratio = Annotated[float, typer.Option("--pruning-ratio", "-r", help="Share of the parameters to prune.")]
RatioOf = Annotated[str, typer.Option(help="What the ratio is of: blocks (their projections) or model (everything).")]
Align = Annotated[int, typer.Option(min=1, help="Make every width a multiple of this (8, 16, 64), or full.")]
Scope = Annotated[str, typer.Option(help="What norms see: full (the whole stream) or selected (the read set).")]
ModelArgument = Annotated[Path, typer.Argument(help="Hugging Face model directory.")]
EVERY_METHOD = {
    "model",
    "output",
    "pruning_ratio",
    "ratio_of",
    "method",
    "norm_scope",
    "align",
    "force",
    "as_json",
}
READING, SEEDED = {"data", "sequence_length", "device"}, {"seed"}
"""Options of the methods without learning: of all, of those that read a text, and of those that have a seed."""
LEARNED = "disp-llm"
MISSED = 0.001
"""The share pruned may differ by so much from the ratio that was asked for; a warning follows otherwise."""


@dataclass(frozen=True, kw_only=True)
class PlaceArguments:
    """Where a model is trained, and in which arithmetic."""

    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")] = None
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default="by device")] = None
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Less memory, a third more work.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class LearnArguments:
    """What `dispc learn` takes."""

    model: ModelArgument
    data: Data = None
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Mask file.", show_default="MODEL/masks.safetensors")
    ] = None
    pruning_ratio: Ratio = 0.5
    ratio_of: RatioOf = "blocks"
    method: Annotated[
        str,
        typer.Option(help="disp-llm (learned), or one of a minute such as gradient; a wrong name lists all."),
    ] = LEARNED
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 10_000
    minutes: Annotated[
        float | None, typer.Option(help="End after so many minutes of steps; --decay falls by the time then.")
    ] = None
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048
    batch_size: Annotated[int, typer.Option(help="Sequences per step, over all processes.")] = 1
    learning_rate: Annotated[float, typer.Option(help="AdamW.")] = 1e-3
    decay: Annotated[
        bool, typer.Option("--decay", help="Let the rate fall linearly to 0 (the paper: constant); for short runs.")
    ] = False
    weight_decay: Annotated[float, typer.Option(help="AdamW.")] = 0.05
    regulariser_weight: Annotated[float, typer.Option(help="Lambda: the weight of the distance from the budget.")] = 6.0
    estimator: Annotated[str, typer.Option(help="reinmax (the paper), gumbel (the authors' published code).")] = (
        "reinmax"
    )
    offset: Annotated[
        float, typer.Option(help="What a latent starts above: at 3, the paper's, 5 % of all gates are off at first.")
    ] = 3.0
    start_from: Annotated[
        str | None,
        typer.Option(help="Begin with the ranking of a method of a minute, such as gradient; for short runs."),
    ] = None
    no_hypernetwork: Annotated[bool, typer.Option("--no-hypernetwork", help="Ablation: free latents.")] = False
    no_gru: Annotated[bool, typer.Option("--no-gru", help="Ablation: a linear layer for the GRU.")] = False
    constrained: Annotated[bool, typer.Option("--constrained", help="Ablation: one set for S1, S2, S3, S5.")] = False
    norm_scope: Scope = "full"
    align: Align = 1
    seed: Annotated[int, typer.Option(min=0, help="Seed of the data order, the noise and the hypernetwork.")] = 0
    place: PlaceArguments
    compile_model: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's checkpoint.")] = False
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run and its masks.")] = False
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log for TensorBoard too.")] = False

    @property
    def file(self) -> Path:
        """Where the masks go."""
        return self.output or self.model / "masks.safetensors"

    def instant(self) -> "Masks":
        """Masks by one of the methods that learn nothing."""
        from dispc.learn.instant import instant_masks

        with count_progress(err, "reading windows") as count:
            return instant_masks(
                self.model,
                self.method,
                self.pruning_ratio,
                ratio_of=self.ratio_of,  # type: ignore[arg-type]
                data=self.data,
                sequence_length=self.sequence_length,
                align=self.align,
                seed=self.seed,
                norm_scope=self.norm_scope,  # type: ignore[arg-type]
                device=self.place.device,
                progress=count,
            )

    def options(self, data: str) -> "LearnOptions":
        """Of a learning run on `data`."""
        from dispc.learn.options import LearnOptions

        return options_from(
            LearnOptions,
            self,
            data=data,
            output=self.file,
            hypernetwork=not self.no_hypernetwork,
            gru=not self.no_gru,
            compile=self.compile_model,
            **vars(self.place),
        )


def learn(context: typer.Context, arguments: LearnArguments, as_json: JsonFlag = False) -> None:
    """Learn masks by DISP-LLM, or make baseline masks at once. Several processes: start with torchrun -m dispc.

    Example: [bold]dispc learn model/ --pruning-ratio 0.5 --data train.txt -o masks-50.safetensors[/bold]
    """
    from dispc.learn.instant import METHODS
    from dispc.masks import check_mask_output
    from dispc.model.published import open_checkpoint

    method, file = arguments.method, arguments.file
    if method not in (LEARNED, *METHODS):
        raise LearnError(f"--method {method}: choose {LEARNED}, {', '.join(METHODS)}")
    if arguments.data is None and (method == LEARNED or METHODS[method].reads):
        raise DataError(f"--method {method} needs a text: give --data FILE")
    if method in METHODS:
        _refuse_what_does_not_apply(context, METHODS[method])
        check_mask_output(file, force=arguments.force)
        masks = arguments.instant()
        masks.save(file, open_checkpoint(arguments.model).config)
    else:
        assert arguments.data is not None
        learned = run_learning(arguments, arguments.options(arguments.data))
        if learned is None:
            return
        masks = learned
    _warn_of_a_missed_budget(masks)
    report_masks(file, arguments.model, as_json)


def run_learning(arguments: LearnArguments, options: "LearnOptions") -> "Masks | None":
    """Learn, and draw how it went; None in all processes but the one that wrote the masks."""
    from dispc.learn.plots import plot_run
    from dispc.learn.trainer import learn

    need("matplotlib", "learn")  # for the pictures at the end: known now, not after the last step
    collect_garbage()
    with learn_progress(err, shown=os.environ.get("RANK", "0") == "0") as (progress, scoring):
        masks, main = learn(options, progress, resume=arguments.resume, force=arguments.force, scoring=scoring)
    if not main:
        return None
    plot_run(options.folder, masks)
    return masks


def _refuse_what_does_not_apply(context: typer.Context, method: "Method") -> None:
    """Raise LearnError naming the first option on the command line that the method does not have."""
    options = EVERY_METHOD | (READING if method.reads else set()) | (SEEDED if method.seeded else set())
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE" and parameter.name not in options:
            method_name = context.params["method"]
            raise LearnError(f"{parameter.opts[0]}: does not apply to --method {method_name}; leave it out")


def _warn_of_a_missed_budget(masks: "Masks") -> None:
    facts = masks.metadata
    asked, reached = float(facts["pruning_ratio"]), float(facts["ratio_reached"])
    if abs(asked - reached) > MISSED:
        remedy = "" if facts["align"] == "1" else f"; an --align below {facts['align']} comes closer"
        what = f"{100 * reached:.2f} % of the {facts['ratio_of']} pruned where {100 * asked:g} % was asked for"
        err.print(f"warning: {what}{remedy}", highlight=False, soft_wrap=True)


def report_masks(file: Path, model: Path, as_json: bool) -> None:
    """Say where the masks are and what they keep."""
    from dispc.masks import Masks
    from dispc.model.published import open_checkpoint

    masks, config = Masks.load(file), open_checkpoint(model).config
    kept, dense = masks.kept_parameters(config), config.all_block_parameters
    facts: dict[str, Any] = {"masks": str(file), "sha256": masks.sha256(), "kept": kept, "dense": dense}
    if as_json:
        print_json(facts | {"metadata": dict(masks.metadata)})
        return
    shown = {"block parameters": f"{kept:,} of {dense:,} ({100 * kept / dense:.2f} %)", "sha256": facts["sha256"]}
    out.print(facts_table({"masks": str(file)} | {k: masks.metadata[k] for k in ("method",)} | shown))


def import_masks(
    source: Annotated[Path, typer.Argument(help="hn-ckpt-*.pt, or a pruned model directory, of the published code.")],
    model: Annotated[Path, typer.Option(help="The dense model it was made from.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Mask file.", show_default="MODEL/masks.safetensors")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older mask file.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Turn what the authors' published code wrote into a mask file. Nothing in it is executed.

    Example: [bold]dispc import-masks hn-ckpt-final-0.50.pt --model Llama-2-7b-hf/ -o masks.safetensors[/bold]
    """
    from dispc.learn.budget import budget_facts
    from dispc.learn.published import import_published
    from dispc.masks import check_mask_output
    from dispc.model.published import open_checkpoint

    file = output or model / "masks.safetensors"
    check_mask_output(file, force=force)
    checkpoint = open_checkpoint(model)
    masks = import_published(source, checkpoint.config)
    masks.with_metadata(budget_facts(masks, checkpoint, "blocks")).save(file, checkpoint.config)
    report_masks(file, model, as_json)
