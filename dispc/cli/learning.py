"""The commands that make masks and say what they are worth: learn, eval, import-masks."""

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from dispc.cli.tables import JsonFlag, count_progress, err, eval_table, facts_table, learn_progress, out, print_json
from dispc.manifest import MANIFEST
from dispc.masks import Masks, check_output
from dispc.support.errors import DataError, LearnError
from dispc.support.extras import need

if TYPE_CHECKING:
    from dispc.learn.instant import Method

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
    "model", "output", "pruning_ratio", "ratio_of", "method", "norm_scope", "align", "force", "as_json",
}  # fmt: skip
READING, SEEDED = {"data", "sequence_length", "device"}, {"seed"}
"""Options of the methods without learning: of all, of those that read a text, and of those that have a seed."""
LEARNED = "disp-llm"
MISSED = 0.001
"""How far the share pruned may be from what was asked for before a warning says so."""


def learn(
    context: typer.Context,
    model: ModelArgument,
    data: Data = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Mask file.", show_default="MODEL/masks.safetensors")
    ] = None,
    pruning_ratio: Ratio = 0.5,
    ratio_of: RatioOf = "blocks",
    method: Annotated[
        str, typer.Option(help="disp-llm (learned), or in a minute: gradient, middle, activation, magnitude, random.")
    ] = LEARNED,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 10_000,
    minutes: Annotated[
        float | None, typer.Option(help="End after so many minutes of steps; --decay falls by the time then.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences per step, over all processes.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="AdamW.")] = 1e-3,
    decay: Annotated[
        bool, typer.Option("--decay", help="Let the rate fall linearly to 0 (the paper: constant); for short runs.")
    ] = False,
    weight_decay: Annotated[float, typer.Option(help="AdamW.")] = 0.05,
    regulariser_weight: Annotated[
        float, typer.Option(help="Lambda: the weight of the distance from the budget.")
    ] = 6.0,
    estimator: Annotated[
        str, typer.Option(help="reinmax (the paper), gumbel (the authors' published code).")
    ] = "reinmax",
    offset: Annotated[
        float, typer.Option(help="What a latent starts above: at 3, the paper's, 5 % of all gates are off at first.")
    ] = 3.0,
    no_hypernetwork: Annotated[bool, typer.Option("--no-hypernetwork", help="Ablation: free latents.")] = False,
    no_gru: Annotated[bool, typer.Option("--no-gru", help="Ablation: a linear layer for the GRU.")] = False,
    constrained: Annotated[bool, typer.Option("--constrained", help="Ablation: one set for S1, S2, S3, S5.")] = False,
    norm_scope: Scope = "full",
    align: Align = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the data order, the noise and the hypernetwork.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default="by device")] = None,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Less memory, a third more work.")
    ] = False,
    compile_model: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run and its masks.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log for TensorBoard too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Learn masks by DISP-LLM, or make baseline masks at once. Several processes: start with torchrun -m dispc.

    Example: [bold]dispc learn model/ --pruning-ratio 0.5 --data train.txt -o masks-50.safetensors[/bold]
    """
    from dispc.learn.instant import METHODS, instant_masks
    from dispc.learn.options import LearnOptions
    from dispc.learn.plots import plot_run
    from dispc.learn.trainer import learn as run_learning
    from dispc.model.published import open_checkpoint

    file = output or model / "masks.safetensors"
    if method not in (LEARNED, *METHODS):
        raise LearnError(f"--method {method}: choose {LEARNED}, {', '.join(METHODS)}")
    if data is None and (method == LEARNED or METHODS[method].reads):
        raise DataError(f"--method {method} needs a text: give --data FILE")
    if method in METHODS:
        _refuse_what_does_not_apply(context, METHODS[method])
        check_output(file, force=force)
        with count_progress(err, "reading windows") as count:
            masks = instant_masks(
                model, method, pruning_ratio, ratio_of=ratio_of, data=data, sequence_length=sequence_length,  # type: ignore[arg-type]
                align=align, seed=seed, norm_scope=norm_scope, device=device, progress=count,  # type: ignore[arg-type]
            )  # fmt: skip
        masks.save(file, open_checkpoint(model).config)
    else:
        assert data is not None
        options = LearnOptions(
            model=model, data=data, output=file, pruning_ratio=pruning_ratio, ratio_of=ratio_of, steps=steps,  # type: ignore[arg-type]
            minutes=minutes, sequence_length=sequence_length, batch_size=batch_size, learning_rate=learning_rate,
            decay=decay, weight_decay=weight_decay, regulariser_weight=regulariser_weight,
            estimator=estimator,  # type: ignore[arg-type]
            offset=offset, hypernetwork=not no_hypernetwork, gru=not no_gru, constrained=constrained,
            norm_scope=norm_scope, align=align, seed=seed, device=device, precision=precision, compile=compile_model,  # type: ignore[arg-type]
            activation_checkpointing=activation_checkpointing, checkpoint_every=checkpoint_every,
            tensorboard=tensorboard,
        )  # fmt: skip
        need("matplotlib", "learn")  # for the pictures at the end: known now, not after the last step
        collect_garbage()
        with learn_progress(err, shown=os.environ.get("RANK", "0") == "0") as progress:
            masks, main = run_learning(options, progress, resume=resume, force=force)
        if not main:
            return
        plot_run(options.folder, masks)
    _warn_of_a_missed_budget(masks)
    report_masks(file, model, as_json)


def collect_garbage() -> None:
    """From here on, and not what was imported: each of many steps leaves cycles behind, which nothing else collects."""
    gc.freeze()
    gc.enable()


def _refuse_what_does_not_apply(context: typer.Context, method: "Method") -> None:
    """Raise LearnError naming the first option on the command line that the method does not have."""
    options = EVERY_METHOD | (READING if method.reads else set()) | (SEEDED if method.seeded else set())
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE" and parameter.name not in options:
            method_name = context.params["method"]
            raise LearnError(f"{parameter.opts[0]}: does not apply to --method {method_name}; leave it out")


def _warn_of_a_missed_budget(masks: Masks) -> None:
    facts = masks.metadata
    asked, reached = float(facts["pruning_ratio"]), float(facts["ratio_reached"])
    if abs(asked - reached) > MISSED:
        remedy = "" if facts["align"] == "1" else f"; an --align below {facts['align']} comes closer"
        what = f"{100 * reached:.2f} % of the {facts['ratio_of']} pruned where {100 * asked:g} % was asked for"
        err.print(f"warning: {what}{remedy}", highlight=False, soft_wrap=True)


def report_masks(file: Path, model: Path, as_json: bool) -> None:
    """Say where the masks are and what they keep."""
    from dispc.model.published import open_checkpoint

    masks, config = Masks.load(file), open_checkpoint(model).config
    kept, dense = masks.kept_parameters(config), config.block_parameters * config.num_hidden_layers
    facts: dict[str, Any] = {"masks": str(file), "sha256": masks.sha256(), "kept": kept, "dense": dense}
    if as_json:
        print_json(facts | {"metadata": dict(masks.metadata)})
        return
    shown = {"block parameters": f"{kept:,} of {dense:,} ({100 * kept / dense:.2f} %)", "sha256": facts["sha256"]}
    out.print(facts_table({"masks": str(file)} | {k: masks.metadata[k] for k in ("method",)} | shown))


def evaluate(
    path: Annotated[Path, typer.Argument(help="Model directory, or artifact.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Text for perplexity, as for learn; may be given several times.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Zero-shot tasks of lm-evaluation-harness, by commas.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Judge the model directory under these masks.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Window.", show_default="2048, or the model's limit")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Read no more windows than this.")] = None,
    include: Annotated[Path | None, typer.Option(help="Directory with further task definitions (YAML).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read no more items per task than this.")] = None,
    device: Annotated[str, typer.Option(help="Where it runs, model or artifact: cpu or cuda.")] = "cpu",
    record: Annotated[
        bool, typer.Option("--record", help="Write the perplexity into the mask file's metadata.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the report to this file too.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Perplexity and zero-shot accuracy of a dense model, of its masked reference, or of an artifact.

    Example: [bold]dispc eval model/ --masks masks.safetensors --data wiki.test.raw[/bold]
    """
    from dispc.evaluate.evaluate import EvalOptions
    from dispc.evaluate.evaluate import evaluate as run_evaluation

    options = EvalOptions(
        path=path, masks=masks, data=tuple(data or ()),
        tasks=tuple(task.strip() for task in tasks.split(",")) if tasks else (),
        sequence_length=sequence_length, max_windows=max_windows, include=include, limit=limit, device=device,
        record=record, json_file=json_file,
    )  # fmt: skip
    collect_garbage()
    unused = path / "masks.safetensors"
    if masks is None and unused.is_file() and not (path / MANIFEST).is_file():
        note = f"note: judged is the dense model; --masks {unused} judges what those leave"
        err.print(escape(note), highlight=False, soft_wrap=True)
    report = run_evaluation(options, lambda what: count_progress(err, what))
    if as_json:
        print_json(report)
    else:
        out.print(eval_table(report))


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
    from dispc.model.published import open_checkpoint

    file = output or model / "masks.safetensors"
    check_output(file, force=force)
    checkpoint = open_checkpoint(model)
    masks = import_published(source, checkpoint.config)
    masks.with_metadata(budget_facts(masks, checkpoint, "blocks")).save(file, checkpoint.config)
    report_masks(file, model, as_json)
