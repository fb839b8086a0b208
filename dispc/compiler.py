"""The whole compiler, read from top to bottom: checkpoint and masks in, artifact out."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from dispc.evaluate.mixed import settle_quantisation
from dispc.export.card import write_card
from dispc.export.companions import write_companions
from dispc.export.dump import Dump
from dispc.export.trace import trace
from dispc.export.write import check_file, save_model
from dispc.manifest import (
    IN_GRAPH,
    MANIFEST,
    BlockParameters,
    LoweringChoice,
    Manifest,
    PassRecord,
    Tuning,
    foreign_to_artifact,
)
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.published import open_checkpoint
from dispc.model.rope import unreached_positions
from dispc.passes.common.versions import needs
from dispc.passes.pipeline import Hessians, build_pipeline, pipeline_line, run_pipeline
from dispc.plan import Choices, Plan, make_plan
from dispc.runtime.calibrate import calibrate
from dispc.runtime.memory import require_memory_for_reference
from dispc.runtime.providers import PROVIDERS
from dispc.runtime.tune import tune
from dispc.support.directories import check_output, staged_directory
from dispc.support.dtypes import DTYPES
from dispc.support.errors import ArtifactError, CompileError
from dispc.support.files import check_outputs, real, write_json
from dispc.support.version import COMPILING, __version__, versions

if TYPE_CHECKING:
    from dispc.validate.report.report import Report

Progress = Callable[[str, int, int], None]
"""progress(what, bytes done, bytes in all)"""


@dataclass(frozen=True, kw_only=True)
class CompileOptions(Choices):
    """What to compile, for what, and where to.

    `masks` None means those of a published pruned model, else MODEL/masks.safetensors; `dense` means no masks. `data`
    is the text for quantisation that looks at one.
    """

    model: Path
    output: Path
    target: str
    masks: Path | None = None
    dense: bool = False
    force: bool = False
    dump_ir: Path | None = None
    verify_each: bool = False
    tune: bool = False
    validate: bool = True
    data: str | None = None


class ParityFailure(ArtifactError):
    """The artifact was made and does not compute what the reference computes; it is not kept."""

    def __init__(self, report: "Report") -> None:
        super().__init__("the artifact fails validation and was not kept; --no-validate keeps it for inspection")
        self.report = report


def compile_model(options: CompileOptions, progress: Progress = lambda what, done, total: None) -> Manifest:
    """Compile a checkpoint into an artifact directory, which appears only when it is complete and has passed.

    Returns the content of its dispc.json; `Manifest.to_json` makes a dictionary of it.

    Raises:
        ParityFailure: when validation ran and a check failed.
        DispcError: for every problem with the input, the options or the output; nothing is left behind.
    """
    started = time.perf_counter()
    _check_paths(options)
    checkpoint = open_checkpoint(options.model)
    plan = make_plan(options.target, options)
    masks = load_masks(checkpoint, options)
    plan, windows = settle_quantisation(checkpoint, masks, plan, options.data, progress)
    plan, tuned = _tuned(checkpoint, masks, plan, options, progress)
    hessians = calibrate(checkpoint, masks, windows, build_artifact) if plan.rounds_by_inputs else None
    if options.validate or options.verify_each:
        require_memory_for_reference(checkpoint, whole=options.verify_each)
    if options.verify_each:
        _verify_each(checkpoint, masks, plan, hessians)
    with staged_directory(options.output, options.force, foreign=foreign_to_artifact) as stage:
        manifest = build_artifact(checkpoint, masks, plan, stage, progress, options.dump_ir, hessians)
        manifest = replace(
            manifest,
            lowering=replace(manifest.lowering, tuned=tuned),
            compile_seconds=round(time.perf_counter() - started, 3),
        )
        write_json(stage / MANIFEST, manifest.to_json())
        if options.validate:
            manifest = _validated(manifest, stage, options, progress)
        write_card(checkpoint, masks, manifest, PROVIDERS[plan.target.provider].genai_build, stage)
    return manifest


def _check_paths(options: CompileOptions) -> None:
    """Raise DispcError unless the output may be written, and replaces nothing that is read or written elsewhere."""
    check_output(options.output, options.force, foreign=foreign_to_artifact)
    for path in (options.model, options.masks, options.dump_ir):
        if path and real(path).is_relative_to(real(options.output)):
            raise ArtifactError(f"{path}: lies in {options.output}, which would be replaced; choose another -o")
    check_outputs([options.dump_ir] if options.dump_ir else [], [options.model])
    Dump(options.dump_ir).check(options.force)


def _tuned(
    checkpoint: Checkpoint, masks: Masks, plan: Plan, options: CompileOptions, progress: Progress
) -> tuple[Plan, Tuning | None]:
    """The plan with the lowering that is fastest on this machine, and what was timed, where `--tune` asks for it."""
    if not options.tune:
        return plan, None
    progress("timing lowerings", 0, 1)
    choices = replace(options, quantisation=plan.quantisation)
    return tune(checkpoint, masks, options.target, choices, build_artifact)


def _verify_each(checkpoint: Checkpoint, masks: Masks, plan: Plan, hessians: Hessians | None) -> None:
    """Compare the graph with the reference after every pass.

    The passes do not look at dtypes: their float32 graphs are compared, whatever the target's dtype is.

    Raises:
        CompileError: naming the pass after which they differ.
    """
    from dispc.validate.checks.verify import make_verifier  # slow to import, and not always needed

    verifier = make_verifier(checkpoint, masks, plan.quantisation)
    run_pipeline(trace(checkpoint, torch.float32), build_pipeline(plan.exact, checkpoint, masks, hessians), verifier)


def _validated(manifest: Manifest, stage: Path, options: CompileOptions, progress: Progress) -> Manifest:
    """The manifest with the report on the artifact in `stage`, where it is written too.

    Raises:
        ParityFailure: when a check failed.
    """
    from dispc.validate import CheckOptions, check  # slow to import, and not always needed

    progress("validating", 0, 1)
    begun = time.perf_counter()
    report = check(
        stage,
        options.model,
        CheckOptions(quick=True, device="available", masks=stage / "masks.safetensors"),
        say=lambda what: progress(f"validating: {what}", 0, 1),
    )
    named = replace(report, artifact=options.output.name, reference=real(options.model).name)
    manifest = replace(manifest, validation_seconds=round(time.perf_counter() - begun, 3), validation=named.as_dict())
    write_json(stage / MANIFEST, manifest.to_json())
    if not report.passed:
        raise ParityFailure(named)
    return manifest


def build_artifact(
    checkpoint: Checkpoint,
    masks: Masks,
    plan: Plan,
    stage: Path,
    progress: Progress = lambda what, done, total: None,
    dump_ir: Path | None = None,
    hessians: Hessians | None = None,
) -> Manifest:
    """Trace, rewrite and write everything but the model card into the empty directory `stage`; the manifest.

    Raises:
        DispcError: for every problem with the input.
        OSError: when something cannot be written.
    """
    started = time.perf_counter()
    progress("tracing", 0, 1)
    model = trace(checkpoint, DTYPES[plan.dtype].torch)
    traced = time.perf_counter()
    passes = build_pipeline(plan, checkpoint, masks, hessians)
    dump = Dump(dump_ir)
    dump.graph(0, "trace", model)
    records = run_pipeline(model, passes, dump.graph)
    manifest = replace(
        describe(checkpoint, masks, plan, model, records),
        pipeline=pipeline_line(passes),
        trace_seconds=round(traced - started, 4),
    )
    dump.not_rewritten(manifest.not_rewritten)
    model.metadata_props.update({key: getattr(manifest, fact) for fact, key in IN_GRAPH.items()})
    save_model(model, stage / "model.onnx", progress)
    check_file(stage / "model.onnx")
    inputs = [value.name or "" for value in model.graph.inputs]
    options = PROVIDERS[plan.target.provider].genai_options(graph=plan.cuda_graph, dtype=plan.dtype)
    write_companions(checkpoint, plan, manifest.cache_layers, inputs, options, stage)
    masks.save(stage / "masks.safetensors", checkpoint.config)
    manifest = replace(manifest, bytes=sum(file.stat().st_size for file in stage.glob("model.onnx*")))
    write_json(stage / MANIFEST, manifest.to_json())
    return manifest


def load_masks(checkpoint: Checkpoint, options: CompileOptions) -> Masks:
    """The masks to compile with, checked against the model's config; a published pruned model brings its own.

    Raises:
        MasksError: when they are missing, malformed, or belong to another model.
    """
    if options.dense:
        if options.masks:
            raise CompileError("--dense and --masks exclude each other")
        return Masks.dense(checkpoint.config)
    if options.masks is None and checkpoint.own_masks is not None:
        return checkpoint.own_masks
    path = options.masks or options.model / "masks.safetensors"
    masks = Masks.load(path)
    masks.check(checkpoint.config, path)
    return masks


def describe(checkpoint: Checkpoint, masks: Masks, plan: Plan, model: ir.Model, records: list[PassRecord]) -> Manifest:
    """Everything about an artifact that a reader may want to know later, but its size in bytes."""
    config = checkpoint.config
    dense = config.all_block_parameters
    return Manifest(
        dispc=__version__,
        versions={"python": platform.python_version()} | versions(*COMPILING),
        model_type=config.family.model_type,
        target=plan.target.name,
        dtype=plan.dtype,
        padding=plan.padding,
        lowering=LoweringChoice(
            name=plan.lowering.name,
            reason=plan.reason,
            filled=plan.filled(masks, config),
            costs=plan.costs if plan.fills else None,
        ),
        align=plan.align,
        fusions=plan.fusions,
        logits="last" if plan.last_logits else "all",
        cuda_graph=plan.cuda_graph,
        quantisation=plan.quantisation,
        attention="GroupQueryAttention" if plan.group_query else "Attention",
        positions=config.max_positions,
        notes=tuple(filter(None, (unreached_positions(checkpoint.ropes, config.max_positions), *checkpoint.notes))),
        stop_tokens=tuple(checkpoint.stop_tokens),
        norm_scope=masks.norm_scope,
        masks_sha256=masks.sha256(),
        config_sha256=checkpoint.config_sha256,
        block_parameters=BlockParameters(dense=dense, kept=masks.kept_parameters(config)),
        cache_layers=masks.cache_layers,
        widths=tuple({name: len(indices) for name, indices in block.sets().items()} for block in masks.blocks),
        nodes=model.graph.num_nodes(),
        needs=needs(model),
        passes=tuple(records),
        bytes=0,
    )
