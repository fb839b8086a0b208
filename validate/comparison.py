"""What is judged: an artifact, loaded, and the masked reference that it must agree with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dispc.evaluate.perplexity import ArtifactScorer, Perplexity, TorchScorer, measure_perplexity, text_windows
from dispc.manifest import Manifest, read_manifest
from dispc.masks import SETS, Masks, set_width
from dispc.model.checkpoint import Checkpoint
from dispc.model.published import open_checkpoint
from dispc.plan import Plan, choices_of, make_plan
from dispc.reference.blocks import Blocks, read_lazily
from dispc.reference.masked import load_reference
from dispc.reference.quantised import match_quantisation, quantise_block, quantise_tables, read_integers
from dispc.reference.stored import Storage
from dispc.reference.truth import Answers, ask, freed, truth_dtype
from dispc.runtime.build import builds
from dispc.runtime.edits import load_graph
from dispc.runtime.latency import Latency, measure_latency
from dispc.runtime.memory import require_memory_for_reference
from dispc.runtime.placement import Placement, place
from dispc.runtime.providers import CPU, PROVIDERS, Provider
from dispc.runtime.session import Artifact
from dispc.support.dtypes import DTYPES, name_of
from dispc.support.errors import ArtifactError, MasksError
from dispc.support.version import __version__, versions
from dispc.targets import TARGETS
from dispc.validate.checks.parity import Distance, measure
from dispc.validate.checks.scenarios import SCENARIOS, ScenarioRun, run_scenario
from dispc.validate.client import Client, Row
from dispc.validate.options import CheckOptions, Device

PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class Measured:
    """A scenario's outputs against the truth: a distance for each row."""

    run: ScenarioRun
    distances: list[Distance]


class Comparison:
    """An artifact and the model that it must agree with. What several checks need is computed once.

    Raises:
        DispcError: when one of the two is unusable, or the artifact was made from another model.
    """

    def __init__(self, directory: Path, reference: Path, options: CheckOptions, *, widened: bool = False) -> None:
        self.options = options
        self.checkpoint = open_checkpoint(reference)
        provider, self.remark = (CPU, "") if widened else choose_provider(directory, options.device)
        self.artifact = Artifact(directory, provider=provider, exact=True, widened=widened or None)
        self.masks = own_masks(self.artifact, self.checkpoint)
        self.truth = truth_dtype(options.reference_dtype)
        if options.data is not None:  # what cannot be read is reported before anything is judged
            text_windows(options.data, reference, self.artifact.positions, options.sequence_length)
        if options.latency is not None:
            options.latency.require_room(directory, self.artifact.positions)
        window = getattr(self.checkpoint.pretrained_config, "sliding_window", None) or 0
        self.client = Client(self.artifact, self.checkpoint.config.vocab_size, options.seed, window=window)
        logits = (self.client.length if options.quick else self.client.longest) * self.client.vocabulary
        require_memory_for_reference(self.checkpoint, whole=options.data is not None, logits=logits)

    @property
    def directory(self) -> Path:
        return self.artifact.directory

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest

    @property
    def target(self) -> str:
        return self.manifest.target

    @property
    def plan(self) -> Plan:
        """What the artifact was compiled with, every choice made.

        Raises:
            CompileError: when dispc.json has choices that no compilation takes.
        """
        plan = make_plan(self.target, choices_of(self.manifest))
        costs = self.manifest.lowering.costs
        return replace(plan, costs=costs) if costs else plan

    @cached_property
    def meant_masks(self) -> tuple[Masks | None, str]:
        """The masks that the artifact is meant to have, and where they are from: those named, else the reference's.

        None where there are no others than the artifact's own.
        """
        beside = self.checkpoint.directory / "masks.safetensors"
        if self.options.masks is None and self.checkpoint.own_masks is not None:
            return self.checkpoint.own_masks, str(self.checkpoint.directory)
        path = self.options.masks or (beside if beside.is_file() else None)
        if path is None:
            return None, f"{self.checkpoint.directory} has none"
        masks = Masks.load(path)
        masks.check(self.checkpoint.config, path)
        return masks, str(path)

    @cached_property
    def measured(self) -> dict[str, Measured]:
        """Every scenario by name: the artifact runs first, then the reference reads all texts at once."""
        runs = [
            run_scenario(scenario, self.client) for scenario in SCENARIOS if scenario.quick or not self.options.quick
        ]
        rows = [row for run in runs for row in run.rows]
        distances = iter(self.measure(rows) if rows else [])
        return {run.scenario.name: Measured(run, [next(distances) for _ in run.rows]) for run in runs}

    @property
    def judged(self) -> list[Distance]:
        """The distances of all scenarios whose figures count."""
        return [each for part in self.measured.values() if not part.run.noted for each in part.distances]

    def measure(self, rows: Sequence[Row]) -> list[Distance]:
        """How far the logits of `rows` are from the truth."""
        answers = self.answers(rows)
        with freed(answers.blocks.model):
            return measure(rows, answers)

    def answers(self, rows: Sequence[Row], *, streams: bool = False) -> Answers:
        """The outputs of the reference for the texts of `rows`."""
        integers = self.manifest.quantisation is not None
        texts = [row.text for row in rows]
        return ask(self.blocks(), texts, self.truth, self.computes_in, streams=streams, integers=integers)

    @cached_property
    def perplexities(self) -> dict[str, Perplexity]:
        """On `options.data`, over the same windows: `artifact`, `reference`, and where weights are quantised
        `unquantised`, the reference without that."""
        options, positions, place = self.options, self.artifact.positions, self.checkpoint.directory
        assert options.data is not None
        measured = partial(
            measure_perplexity,
            data=options.data,
            sequence_length=options.sequence_length,
            max_windows=options.max_windows,
        )
        results = {"artifact": measured(ArtifactScorer.of(self.artifact))}
        with freed(self.load()) as model:
            results["reference"] = measured(TorchScorer.of(model, place, positions))
        if self.manifest.quantisation:
            with freed(load_reference(self.checkpoint, self.masks)) as model:
                results["unquantised"] = measured(TorchScorer.of(model, place, positions))
        return results

    @cached_property
    def times(self) -> Latency | None:
        """The result of `measure_latency`; None where it was not asked for."""
        options = self.options
        if options.latency is None:
            return None
        return measure_latency(self.directory, options.dense, options.latency, self.artifact.provider)

    @property
    def intended(self) -> Provider:
        """The provider that the target is meant for."""
        return PROVIDERS[TARGETS[self.target].provider]

    @cached_property
    def placement(self) -> Placement | ArtifactError | None:
        """The provider of each node, or why it cannot be read; None where something else runs than what is stored, or
        somewhere else than it is meant to."""
        if self.artifact.widened or self.artifact.provider != self.intended:
            return None
        try:
            return place(self.directory / "model.onnx", self.artifact.provider)
        except ArtifactError as error:
            return error

    @property
    def computes_in(self) -> str:
        """The precision of the arithmetic: a widened artifact has to be as exact as float32 is."""
        return "float32" if self.artifact.widened else self.artifact.dtype

    @cached_property
    def storage(self) -> Storage:
        """What the artifact stores of each weight."""
        initializers = self.graph().graph.initializers
        norms = {name: value.const_value for name, value in initializers.items() if "norm" in name}
        widths = {name: int(tensor.shape.numpy()[0]) for name, tensor in norms.items() if tensor and tensor.shape}
        return Storage(self.checkpoint.config, self.masks, widths)

    def graph(self) -> ir.Model:
        """The graph of the artifact, its weights still in their file."""
        return load_graph(self.directory / "model.onnx")

    def blocks(self) -> Blocks:
        """The same as `load`, each block read when it is needed."""
        options, dtype = self.manifest.quantisation, DTYPES[self.artifact.dtype].torch
        integers = read_integers(options, self.graph, self.checkpoint.family) if options else None

        def as_stored(part: Any, index: int | None) -> None:
            if self.artifact.widened:
                self.storage.round(part, index, dtype)
            if options and index is None:
                quantise_tables(part, options, dtype, integers)
            elif options and index is not None:
                sets = self.masks.blocks[index]
                quantise_block(part, index, self.checkpoint.family, sets, options, dtype, integers)

        return read_lazily(self.checkpoint, self.masks, as_stored)

    def load(self) -> Any:
        """The masked reference, in float32, with the weights rounded as a widened or quantised artifact stores them."""
        reference = load_reference(self.checkpoint, self.masks)
        if self.artifact.widened:
            dtype, family = DTYPES[self.artifact.dtype].torch, self.checkpoint.family
            for index in range(len(self.masks.blocks)):
                self.storage.round(reference.get_submodule(family.block(index)), index, dtype)
            self.storage.round(reference, None, dtype)
        match_quantisation(reference, self.checkpoint.family, self.masks, self.manifest, self.graph)
        return reference

    @cached_property
    def widened(self) -> "Comparison | None":
        """The same with half-precision weights widened to float32, on the CPU; None where that is what is judged."""
        if self.artifact.dtype == "float32" or self.artifact.widened:
            return None
        return Comparison(self.directory, self.checkpoint.directory, replace(self.options, quick=True), widened=True)

    def facts(self) -> dict[str, Any]:
        """The part of a report about what was compared, and where."""
        artifact, masks = self.artifact, self.masks
        precision = "weights widened to float32" if artifact.widened else f"{artifact.dtype} as is"
        return {
            "artifact": str(artifact.directory),
            "reference": str(self.checkpoint.directory),
            "target": self.target,
            "dtype": artifact.dtype,
            "padding": artifact.padding,
            "lowering": self.manifest.lowering.name,
            "judged_on": f"{artifact.provider}{self.remark}, {precision}",
            "truth": f"reference in {name_of(self.truth)}"
            + (f" with weights rounded to {artifact.dtype}" if artifact.widened else ""),
            "device": artifact.provider.processor(),
            "versions": {"dispc": __version__}
            | {build.name: build.version for build in builds()}
            | versions(*PACKAGES),
            "bytes": self.manifest.bytes,
            "widths": tuple({name: len(v) for name, v in block.sets().items()} for block in masks.blocks),
            "full_widths": {name: set_width(name, masks.hidden_size, masks.intermediate_size) for name in SETS},
        }


def own_masks(artifact: Artifact, checkpoint: Checkpoint) -> Masks:
    """The masks that `artifact` was compiled with.

    Raises:
        DispcError: when it was not compiled from `checkpoint`, or its files do not belong together.
    """
    directory, reference = artifact.directory, checkpoint.directory
    outputs = {value.name: value.shape for value in artifact.session.get_outputs()}
    if (columns := outputs.get("logits", [None])[-1]) != checkpoint.config.vocab_size:
        what = f"logits has {columns} columns" if columns else "it has no output logits"
        why = f"{what}, {reference} a vocabulary of {checkpoint.config.vocab_size}"
        raise ArtifactError(f"{directory}: was not compiled from {reference}, or not by dispc: {why}")
    masks = Masks.load(directory / "masks.safetensors")
    masks.check(checkpoint.config, directory / "masks.safetensors")
    if masks.sha256() != artifact.manifest.masks_sha256:
        raise MasksError(f"{directory}: masks.safetensors is not the file that the artifact was compiled with")
    if checkpoint.config_sha256 != artifact.manifest.config_sha256:
        raise ArtifactError(f"{directory}: was not compiled from {reference} (config.json differs)")
    return masks


def choose_provider(artifact: Path, device: Device) -> tuple[Provider, str]:
    """The execution provider to judge on, and the remark that its name needs in the report's first line.

    Raises:
        ArtifactError: when the target's provider does not load here and the CPU was not asked for.
    """
    name = read_manifest(artifact).target
    target = TARGETS.get(name)
    if target is None:
        raise ArtifactError(f"{artifact}: is for the target {name}, which this dispc does not know")
    wanted = PROVIDERS[target.provider]
    if wanted.fallback:
        return wanted, ""
    if device == "cpu":
        return CPU, f" instead of {wanted} (chosen)"
    if device == "target":
        wanted.require(f"{artifact}: is for {wanted.title}", "--on-cpu judges parity on the CPU")
    problem = wanted.problem()
    return (wanted, "") if problem is None else (CPU, f" instead of {wanted} (not here: {problem})")
