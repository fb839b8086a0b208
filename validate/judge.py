"""`dispc.validate.check`: run an artifact in every way that matters, and judge it against the masked reference."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from dispc.evaluate.perplexity import ArtifactScorer, TorchScorer, measure_perplexity, text_windows
from dispc.manifest import read_manifest
from dispc.masks import SETS, Masks, set_width
from dispc.model.checkpoint import Checkpoint
from dispc.model.published import open_checkpoint
from dispc.plan import TARGETS
from dispc.reference.masked import load_reference
from dispc.reference.quantised import match_quantisation
from dispc.reference.truth import Answers, ask, freed, round_storage, truth_dtype
from dispc.runtime.latency import LatencyOptions, judge_latency, measure_latency
from dispc.runtime.memory import fits_memory, require_memory_for_reference
from dispc.runtime.placement import Placement, judge_placement
from dispc.runtime.providers import CPU, PROVIDERS, Provider
from dispc.runtime.session import Artifact
from dispc.support.check import Check
from dispc.support.dtypes import DTYPES, name_of
from dispc.support.errors import ArtifactError, MasksError
from dispc.support.version import __version__
from dispc.validate.checks import parity
from dispc.validate.checks.drill import drill_down
from dispc.validate.checks.embeddings import judge_embeddings
from dispc.validate.checks.parity import Thresholds
from dispc.validate.checks.rotary import judge_rotary
from dispc.validate.checks.scenarios import PREFILL, Row, Scenario, Stage, Turn, judge_bits, play
from dispc.validate.checks.static import judge_companions, judge_file
from dispc.validate.report.baseline import compare, read_report
from dispc.validate.report.report import Report

Device = Literal["target", "cpu", "available"]
PACKAGES = ("onnxruntime-gpu", "torch", "transformers")


def check(
    artifact: Path,
    reference: Path,
    *,
    thresholds: Thresholds | None = None,
    device: Device = "target",
    quick: bool = False,
    drill: bool = False,
    data: str | None = None,
    sequence_length: int | None = None,
    max_windows: int | None = None,
    latency: LatencyOptions | None = None,
    dense: Path | None = None,
    baseline: Path | None = None,
    max_regression: float = 0.05,
    reference_dtype: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda what: None,
) -> Report:
    """Judge `artifact` against the model of `reference` with the artifact's own masks.

    `device`: the provider of the artifact's `target`; `cpu` whatever the target; `available` falls back to the CPU, and
    the report says so. `quick` runs what a compilation runs: the scenarios that find most faults, and nothing else.
    `drill` compares block by block even when parity holds; where it does not, that is done anyway. `data` adds
    perplexity, in windows of `sequence_length`.
    `latency` adds times, beside those of the artifact `dense`. `baseline` is an earlier report: no figure may be worse
    by more than the share `max_regression`. `say` is told what is being done.

    Raises:
        DispcError: when the comparison cannot be made; nothing was judged then.
    """
    artifact, reference = Path(artifact), Path(reference)
    thresholds = thresholds or parity.DEFAULTS
    older = read_report(baseline) if baseline else None
    trial = Trial.prepare(artifact, reference, device, reference_dtype)
    if data is not None:  # what cannot be read is told before anything is judged
        text_windows(data, reference, trial.artifact.positions, sequence_length)
    if latency is not None:
        latency.require_room(artifact, trial.artifact.positions)
    window = getattr(trial.checkpoint.pretrained_config, "sliding_window", None) or 0
    stage = Stage(trial.artifact, trial.checkpoint.config.vocab_size, seed, window=window)
    say("running the artifact")
    played = play(stage, quick=quick)
    say("asking the reference")
    answers = trial.answers([row for turn in played for row in turn.rows])
    checks = parity.judge(played, answers, thresholds)
    if trial.artifact.last_logits or trial.artifact.int8_activations:
        checks.append(parity.judge_shipped(Artifact(artifact, provider=trial.artifact.provider), trial.artifact, stage))
    placement: Placement | None = None
    drilled = measured = times = None
    if not quick:
        checks = [
            judge_file(artifact / "model.onnx", trial.target),
            judge_companions(artifact, trial.artifact.manifest, trial.checkpoint),
            *checks,
            judge_bits(stage),
            judge_embeddings(artifact, trial.checkpoint),
            judge_rotary(trial.artifact, trial.checkpoint),
        ]
        placement, judged = judge_placement(trial.artifact)
        checks.append(judged)
    scenario = scenario_to_drill(played, checks) or (PREFILL if drill else None)
    if scenario is not None:
        say("drilling down")
        drilled = drill_down(stage, scenario, trial.masks, trial.answers, thresholds.error)
    if data is not None:
        say("measuring perplexity")
        measured, judged_texts = judge_text(
            trial, thresholds.perplexity, data, sequence_length=sequence_length, max_windows=max_windows
        )
        checks += judged_texts
    if latency is not None:
        say("measuring latency")
        times = measure_latency(artifact, dense, latency, trial.artifact.provider)
        checks += judge_latency(times)
    report = Report(
        **trial.facts(), checks=tuple(checks), drill=drilled, perplexity=measured,
        placement=placement.as_dict() if placement else None, latency=times, quick=quick, seed=seed,
    )  # fmt: skip
    return report if older is None else compare(report, older, max_regression)


def scenario_to_drill(played: Sequence[Turn], checks: Sequence[Check]) -> Scenario | None:
    """Where to look for what is wrong: the first scenario that failed by itself, else the one that is furthest off.

    None when no check of parity failed.
    """
    found = {check.name: check for check in checks if check.group == "parity"}
    if all(check.passed for check in found.values()):
        return None
    turns = [turn for turn in played if turn.rows and turn.scenario.streams and not turn.told]
    own = [found[parity.LOGITS_CHECK.get(turn.scenario.name, turn.scenario.name)] for turn in turns]
    pairs = list(zip(own, turns, strict=True))
    failed = next((turn.scenario for check, turn in pairs if not check.passed), None)
    return failed or max(pairs, key=lambda pair: pair[0].figure or 0)[1].scenario if pairs else None


def judge_text(trial: "Trial", limit: float, data: str, **windows: Any) -> tuple[dict[str, Any], list[Check]]:
    """Perplexities of the artifact and of its reference on `data`; told beside them, that of the model not quantised.

    Both are of what parity is judged on: all logits, no int8 activations, the weights as they are stored.
    """
    positions, reference = trial.artifact.positions, trial.checkpoint.directory
    ours = measure_perplexity(ArtifactScorer.of(trial.artifact), data, **windows)
    with freed(trial.load()) as model:
        theirs = measure_perplexity(TorchScorer.of(model, reference, positions), data, **windows)
    measured = {"artifact": ours.as_dict(), "reference": theirs.as_dict()}
    checks = [parity.judge_perplexity("perplexity", ours, theirs, limit)]
    if trial.artifact.manifest.get("quantisation"):
        with freed(load_reference(trial.checkpoint, trial.masks)) as whole:
            exact = measure_perplexity(TorchScorer.of(whole, reference, positions), data, **windows)
        measured["unquantised"] = exact.as_dict()
        checks.append(parity.judge_perplexity("cost of quantisation", ours, exact, None))
    return measured, checks


@dataclass(frozen=True)
class Trial:
    """An artifact, loaded, and the model that it must agree with."""

    artifact: Artifact
    checkpoint: Checkpoint
    masks: Masks
    truth: torch.dtype
    remark: str

    @staticmethod
    def prepare(directory: Path, reference: Path, device: Device, reference_dtype: str | None) -> "Trial":
        """Load what is to be compared, and make sure that it can be.

        Raises:
            DispcError: when one of the two is unusable, or the artifact was made from another model.
        """
        checkpoint = open_checkpoint(reference)
        provider, remark = choose_provider(directory, device)
        artifact = Artifact(directory, provider=provider, exact=True)
        outputs = {value.name: value.shape for value in artifact.session.get_outputs()}
        if (columns := outputs.get("logits", [None])[-1]) != checkpoint.config.vocab_size:
            what = f"logits has {columns} columns" if columns else "it has no output logits"
            say = f"{what}, {reference} a vocabulary of {checkpoint.config.vocab_size}"
            raise ArtifactError(f"{directory}: was not compiled from {reference}, or not by dispc: {say}")
        masks = Masks.load(directory / "masks.safetensors")
        masks.check(checkpoint.config, directory / "masks.safetensors")
        if masks.sha256() != artifact.manifest["masks_sha256"]:
            raise MasksError(f"{directory}: masks.safetensors is not the file that the artifact was compiled with")
        if checkpoint.config_sha256 != artifact.manifest["config_sha256"]:
            raise ArtifactError(f"{directory}: was not compiled from {reference} (config.json differs)")
        parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
        truth = truth_dtype(parameters, reference_dtype, room=fits_memory(checkpoint, torch.float64.itemsize))
        require_memory_for_reference(checkpoint, truth.itemsize)
        return Trial(artifact, checkpoint, masks, truth, remark)

    @property
    def target(self) -> str:
        return str(self.artifact.manifest["target"])

    def answers(self, rows: Sequence[Row], *, streams: bool = False) -> Answers:
        """What the reference says about the texts of `rows`."""
        family, texts = self.checkpoint.family, [row.text for row in rows]
        return ask(self.load, family, texts, self.truth, self.computes_in, streams=streams)

    @property
    def computes_in(self) -> str:
        """The precision of the arithmetic: a widened artifact has to be as exact as float32 is."""
        return "float32" if self.artifact.widened else self.artifact.dtype

    def load(self) -> Any:
        """The masked reference, in float32, with the weights rounded as a widened or quantised artifact stores them."""
        family = self.checkpoint.family
        reference = load_reference(self.checkpoint, self.masks)
        if self.artifact.widened:
            round_storage(reference, DTYPES[self.artifact.dtype].torch)
        match_quantisation(reference, family, self.masks, self.artifact.manifest)
        return reference

    def facts(self) -> dict[str, Any]:
        """The part of a report that tells what was compared, and where."""
        artifact, masks, manifest = self.artifact, self.masks, self.artifact.manifest
        precision = "weights widened to float32" if artifact.widened else f"{artifact.dtype} as is"
        return {
            "artifact": str(artifact.directory), "reference": str(self.checkpoint.directory), "target": self.target,
            "dtype": artifact.dtype, "padding": artifact.padding, "lowering": manifest["lowering"]["name"],
            "judged_on": f"{artifact.provider}{self.remark}, {precision}",
            "truth": f"reference in {name_of(self.truth)}"
                     + (f" with weights rounded to {artifact.dtype}" if artifact.widened else ""),
            "device": artifact.provider.processor(),
            "versions": {"dispc": __version__} | {name: version(name) for name in PACKAGES},
            "bytes": manifest["bytes"],
            "widths": tuple({name: len(v) for name, v in block.sets().items()} for block in masks.blocks),
            "full_widths": {name: set_width(name, masks.hidden_size, masks.intermediate_size) for name in SETS},
        }  # fmt: skip


def choose_provider(artifact: Path, device: Device) -> tuple[Provider, str]:
    """The execution provider to judge on, and the remark that its name needs in the report's first line.

    Raises:
        ArtifactError: when the target's provider does not load here and the CPU was not asked for.
    """
    name = read_manifest(artifact)["target"]
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
