"""The command that trains a pruned model: recover."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dispc.cli.arguments import options_from
from dispc.cli.learning import ModelArgument, PlaceArguments
from dispc.cli.process import collect_garbage
from dispc.cli.tables import JsonFlag, err, facts_table, learn_progress, out, print_json
from dispc.support.extras import need

if TYPE_CHECKING:
    from dispc.learn.recovery_options import RecoverOptions


@dataclass(frozen=True, kw_only=True)
class RecoverArguments:
    """What `dispc recover` takes."""

    model: ModelArgument
    data: Annotated[str, typer.Option(help="Text to train on, as for learn.")]
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to make.")]
    masks: Annotated[Path | None, typer.Option(help="Mask file.", show_default="MODEL/masks.safetensors")] = None
    held_out: Annotated[
        str | None, typer.Option(help="Text to judge by.", show_default="16 windows at the end of the text")
    ] = None
    teacher: Annotated[
        Path | None, typer.Option(help="Dense model to learn from.", show_default="MODEL, without masks")
    ] = None
    loss: Annotated[
        str, typer.Option(help="distil (divergence from the dense model), text (its own loss), or both.")
    ] = "both"
    lora: Annotated[
        int, typer.Option(help="Train adapters of this rank, merged at the end; 0: all weights of the blocks.")
    ] = 0
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000
    minutes: Annotated[float | None, typer.Option(help="End after so many minutes of steps.")] = None
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512
    batch_size: Annotated[int, typer.Option(help="Sequences at once, over all processes.")] = 4
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = 1
    learning_rate: Annotated[float | None, typer.Option(help="AdamW.", show_default="1e-4, with --lora 1e-3")] = None
    warm_up: Annotated[float, typer.Option(help="Share of the steps; then the rate falls by half a cosine.")] = 0.05
    weight_decay: Annotated[float, typer.Option(help="AdamW.")] = 0.01
    evaluate_every: Annotated[int, typer.Option(help="Steps between judgements by the held-out text.")] = 50
    patience: Annotated[int, typer.Option(help="Stop after so many judgements without a gain.")] = 10
    seed: Annotated[int, typer.Option(min=0, help="Seed of the data order and the adapters.")] = 0
    place: PlaceArguments
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's checkpoint.")] = False
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run and its model.")] = False

    def options(self) -> "RecoverOptions":
        from dispc.learn.recovery_options import FULL_RATE, LORA_RATE, RecoverOptions

        default_rate = LORA_RATE if self.lora else FULL_RATE
        return options_from(
            RecoverOptions,
            self,
            masks=self.masks or self.model / "masks.safetensors",
            learning_rate=default_rate if self.learning_rate is None else self.learning_rate,
            **vars(self.place),
        )


def recover(arguments: RecoverArguments, as_json: JsonFlag = False) -> None:
    """Train the weights that masks keep, by the outputs of the dense model. Several processes: torchrun -m dispc.

    Example: [bold]dispc recover model/ --masks masks-50.safetensors --data train.txt -o model-50/[/bold]
    """
    from dispc.learn.plots import plot_recovery
    from dispc.learn.recovery import recover

    options = arguments.options()
    need("matplotlib", "learn")  # for the picture at the end: known now, not after the last step
    collect_garbage()
    with learn_progress(err, shown=os.environ.get("RANK", "0") == "0") as (progress, _):
        outcome, main = recover(options, progress, resume=arguments.resume, force=arguments.force)
    if not main:
        return
    plot_recovery(options.folder)
    if outcome.ended:
        err.print(f"note: ended early: {outcome.ended}", highlight=False, soft_wrap=True)
    if not outcome.gained:
        err.print("note: nothing was gained on the held-out text; the weights are the pruned model's", soft_wrap=True)
    if as_json:
        print_json({"model": str(options.output)} | vars(outcome))
        return
    shown = {
        name: f"{outcome.begin[key]:.4f} -> {outcome.best[key]:.4f} nats"
        for name, key in (("divergence from the dense model", "distil"), ("loss of the text", "text"))
    }
    out.print(
        facts_table(
            {"model": str(options.output), "best of the steps": f"{outcome.best_step} of {outcome.steps}"} | shown
        )
    )
