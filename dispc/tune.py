"""`--tune`: time the lowerings that a target can run on this machine, on a few of the model's own blocks.

Which lowering is fastest depends on the device and on the widths. Each candidate becomes a small artifact of some
blocks of the model, with their own weights and sets but next to no vocabulary (the head would hide the difference); all
are loaded, and take turns at a prompt and at single tokens.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dispc.checkpoint import Checkpoint, CheckpointTensor
from dispc.errors import CompileError
from dispc.families import DecoderConfig
from dispc.masks import Masks
from dispc.targets import Choices, Lowering, Plan, make_plan

BLOCKS, VOCABULARY = 4, 128
PROMPT, PAST = 128, 64
MARGIN = 0.02
"""Another lowering must decode faster than the default by more than this share, which is noise."""
Build = Callable[[Checkpoint, Masks, Plan, Path], object]
"""Compiles a checkpoint with masks by a plan into a directory that is empty."""
DECODING, PREFILL = "one_token", "first_token"


class SomeBlocks(Checkpoint):
    """Some blocks of a checkpoint, numbered from 0, with the first tokens of its vocabulary: all there is to time."""

    def __init__(self, whole: Checkpoint, chosen: tuple[int, ...]) -> None:
        super().__init__(whole.directory)
        self.whole, self.chosen = whole, chosen

    @cached_property
    def pretrained_config(self) -> Any:
        config = copy.deepcopy(self.whole.pretrained_config)
        config.vocab_size, config.pad_token_id = self.config.vocab_size, None
        return config

    @cached_property
    def config(self) -> DecoderConfig:
        whole = self.whole.config
        kinds = tuple(whole.layer_kinds[block] for block in self.chosen)
        vocabulary = min(VOCABULARY, whole.vocab_size)
        return replace(whole, num_hidden_layers=len(kinds), layer_kinds=kinds, vocab_size=vocabulary)

    def find(self, name: str) -> CheckpointTensor:
        if name.startswith(("lm_head.", f"{self.family.embedding}.")):
            tensor, count = self.whole.find(name), self.config.vocab_size
            return replace(tensor, shape=(count, *tensor.shape[1:]), read=lambda: tensor.read()[:count])
        for number, block in enumerate(self.chosen):
            prefix = f"{self.family.block(number)}."
            if name.startswith(prefix):
                return self.whole.find(f"{self.family.block(block)}.{name.removeprefix(prefix)}")
        return self.whole.find(name)


def tune(
    checkpoint: Checkpoint, masks: Masks, target: str, choices: Choices, build: Build
) -> tuple[Plan, dict[str, Any]]:
    """The plan with the lowering that decodes fastest here, and the record of how it was chosen.

    The record has `blocks` (those that were timed), `device`, `threads` (0: ONNX Runtime's choice) and `milliseconds`:
    for each lowering the median of a prompt of 128 tokens (`first_token`) and of a token behind 64 (`one_token`), or
    of half the model's positions where that is less.

    Raises:
        CompileError: when a lowering was chosen as well, or the target's device is not here.
    """
    if choices.lowering is not None:
        raise CompileError("--tune chooses the lowering; leave out --lowering, or --tune")
    plans = dict(_candidates(target, choices))
    provider = next(iter(plans.values())).target.provider
    alive = [number for number, block in enumerate(masks.blocks) if block.attention.alive or block.mlp.alive]
    if not alive:
        raise CompileError("--tune: the masks leave no block anything to do")
    places = np.linspace(0, len(alive) - 1, min(BLOCKS, len(alive))).round().astype(int)
    blocks = tuple(alive[place] for place in places)
    part = SomeBlocks(checkpoint, blocks)
    kept = replace(masks, blocks=tuple(masks.blocks[block] for block in blocks))
    with _artifacts(part, kept, plans, build) as artifacts:
        milliseconds = time_lowerings(artifacts, provider, checkpoint.config.max_positions)
    best = min(milliseconds, key=lambda name: milliseconds[name][DECODING])
    default = make_plan(target, choices).lowering
    if milliseconds[best][DECODING] > (1 - MARGIN) * milliseconds[default][DECODING]:
        best = default
    reason = f"fastest of {len(plans)} on this machine (--tune)"
    if best == default:
        reason = f"default; none of {len(plans)} is faster on this machine (--tune)"
    record = {"blocks": list(blocks), "device": device_name(provider), "threads": 0, "milliseconds": milliseconds}
    return replace(plans[best], reason=reason), record


def _candidates(target: str, choices: Choices) -> Iterator[tuple[str, Plan]]:
    for lowering in get_args(Lowering):
        try:
            yield lowering, make_plan(target, replace(choices, lowering=lowering))
        except CompileError:
            if lowering == "inverse-gather":  # runs everywhere: something else is wrong
                raise


@contextmanager
def _artifacts(part: Checkpoint, masks: Masks, plans: dict[str, Plan], build: Build) -> Iterator[dict[str, Path]]:
    with tempfile.TemporaryDirectory(prefix="dispc-tune-") as scratch:
        artifacts = {name: Path(scratch) / name for name in plans}
        for name, plan in plans.items():
            artifacts[name].mkdir()
            build(part, masks, plan, artifacts[name])
        yield artifacts


def time_lowerings(artifacts: dict[str, Path], provider: str, positions: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a prompt and of a token for each artifact of a model that takes so many positions."""
    from dispc.validate.latency import LatencyOptions, TimedArtifact, time_case
    from dispc.validate.session import CUDA

    if provider == CUDA:
        from dispc.validate.doctor import cuda_problem

        if problem := cuda_problem():
            raise CompileError(f"--tune times the lowerings on CUDA, which is not here: {problem}")
    prompt, past = min(PROMPT, positions // 2), min(PAST, positions // 2)
    loaded = {name: [TimedArtifact(path, provider, 0, False, prompt)] for name, path in artifacts.items()}
    milliseconds: dict[str, dict[str, float]] = {name: {} for name in artifacts}
    options = LatencyOptions()
    for kind, length, label in (("first token", prompt, PREFILL), ("one token", past, DECODING)):
        for row in time_case(loaded, kind, 1, length, options):
            milliseconds[row["artifact"]][label] = round(row["p50"], 4)
    return milliseconds


def device_name(provider: str) -> str:
    """The processor or the GPU that was timed."""
    if provider != "CPUExecutionProvider":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else provider
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
