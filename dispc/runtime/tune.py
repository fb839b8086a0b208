"""`--tune`: measure what selections cost on this machine, and time the lowerings on a few of the model's own blocks.

Which lowering is fastest depends on the device and on the widths. Each candidate becomes a small artifact of some
blocks of the model, with their own weights and sets but next to no vocabulary (the head would hide the difference); all
are loaded, and run a prompt and single tokens alternately.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dispc.lowerings import LOWERINGS
from dispc.manifest import Tuning
from dispc.masks import Block, Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.config import DecoderConfig, keep_blocks
from dispc.model.storage import CheckpointTensor
from dispc.plan import Choices, Plan, make_plan
from dispc.runtime.costs import fit_costs
from dispc.runtime.providers import PROVIDERS
from dispc.selection import SelectionCosts, sets_to_fill
from dispc.support.errors import CompileError

BLOCKS, VOCABULARY = 4, 128
PROMPT, PAST = 128, 64
MARGIN = 0.05
"""Another lowering must be faster than the default by more than this share; less is noise."""
Build = Callable[[Checkpoint, Masks, Plan, Path], object]
"""Compiles a checkpoint with masks by a plan into an empty directory."""
DECODING, PREFILL = "one_token", "first_token"


class SomeBlocks(Checkpoint):
    """Some blocks of a checkpoint, numbered from 0, with the first tokens of its vocabulary: all there is to time."""

    def __init__(self, whole: Checkpoint, chosen: tuple[int, ...]) -> None:
        super().__init__(whole.directory)
        self.whole, self.chosen = whole, chosen

    @cached_property
    def pretrained_config(self) -> Any:
        config = keep_blocks(self.whole.pretrained_config, self.chosen)
        config.vocab_size, config.pad_token_id = self.config.vocab_size, None
        return config

    @cached_property
    def config(self) -> DecoderConfig:
        whole = self.whole.config
        kinds = tuple(whole.layer_kinds[block] for block in self.chosen)
        vocabulary = min(VOCABULARY, whole.vocab_size)
        return replace(whole, num_hidden_layers=len(kinds), layer_kinds=kinds, vocab_size=vocabulary)

    def require_places(self, parameters: Iterable[str]) -> None:
        """Nothing: most of what is stored has no place here on purpose."""

    def find(self, name: str) -> CheckpointTensor:
        if name.startswith(("lm_head.", f"{self.family.embedding}.")):
            tensor, count = self.whole.find(name), self.config.vocab_size
            return replace(tensor, shape=(count, *tensor.shape[1:]), read=lambda: tensor.read()[:count])
        for number, block in enumerate(self.chosen):
            prefix = f"{self.family.block(number)}."
            if name.startswith(prefix):
                return self.whole.find(f"{self.family.block(block)}.{name.removeprefix(prefix)}")
        return self.whole.find(name)


def tune(checkpoint: Checkpoint, masks: Masks, target: str, choices: Choices, build: Build) -> tuple[Plan, Tuning]:
    """The plan with the lowering that is fastest here (`choose`), and the record of how it was chosen.

    The plan's `costs` are those of this machine, unless the weights are integers, which are never filled with zeros.
    The record has `blocks` (those that were timed), `device`, `threads` and `milliseconds`: for each lowering the
    median of a prompt of 128 tokens (`first_token`) and of a token after 64 (`one_token`, with a CUDA graph where the
    artifact asks for one), or of half the model's positions where that is less.

    Raises:
        CompileError: when a lowering was chosen as well, nothing is pruned, the target's device is not here, or there
            is no room for the candidates.
    """
    if choices.lowering is not None:
        raise CompileError("--tune chooses the lowering; leave out --lowering, or --tune")
    default = make_plan(target, choices)
    _require_device(default)
    pruned = [number for number, block in enumerate(masks.blocks) if _part_widths(block, masks.hidden_size)]
    if not pruned:
        raise CompileError("--tune: no sub-layer reads or writes a part of the stream; all lowerings are alike")
    places = np.linspace(0, len(pruned) - 1, min(BLOCKS, len(pruned))).round().astype(int)
    blocks = tuple(pruned[int(place)] for place in places)
    part = SomeBlocks(checkpoint, blocks)
    kept = replace(masks, blocks=tuple(masks.blocks[block] for block in blocks))
    costs = default.costs if choices.quantisation else fit_costs(masks.hidden_size, default, os.cpu_count() or 1)
    plans = dict(_candidates(target, choices, masks, checkpoint.config, costs))
    try:
        with _artifacts(part, kept, plans, build) as artifacts:
            milliseconds = time_lowerings(artifacts, default, checkpoint.config.max_positions)
    except OSError as error:
        raise CompileError(f"--tune: {tempfile.gettempdir()}: {error.strerror or error}") from error
    usual = default.lowering.name if default.lowering.name in plans else default.lowering.unfilled
    best, reason = choose(milliseconds, usual)
    record = Tuning(
        blocks=blocks,
        threads=os.cpu_count(),
        device=PROVIDERS[default.target.provider].processor(),
        milliseconds=milliseconds,
    )
    return replace(plans[best], reason=reason), record


def choose(milliseconds: Mapping[str, Mapping[str, float]], default: str) -> tuple[str, str]:
    """The lowering to take instead of `default`, if any, and why; `milliseconds` is as in `tune`.

    A token counts first. Of those that take no more than MARGIN longer for one than the fastest, the default is taken,
    or the fastest where it is not among them; unless another reads a prompt faster than that one by more than MARGIN.
    """

    def clearly_faster(name: str, other: str, label: str) -> bool:
        return milliseconds[name][label] <= (1 - MARGIN) * milliseconds[other][label]

    count, where = len(milliseconds), "on this machine (--tune)"
    fastest = min(milliseconds, key=lambda name: milliseconds[name][DECODING])
    alike = [name for name in milliseconds if not clearly_faster(fastest, name, DECODING)]
    usual = default if default in alike else fastest
    reader = min(alike, key=lambda name: milliseconds[name][PREFILL])
    if clearly_faster(reader, usual, PREFILL):
        return reader, f"fastest of {count} with a prompt, and none is clearly faster with a token, {where}"
    if usual == default:
        return default, f"default; none of {count} is clearly faster {where}"
    return usual, f"fastest of {count} with a token {where}"


def _require_device(plan: Plan) -> None:
    provider = PROVIDERS[plan.target.provider]
    if problem := provider.problem():
        raise CompileError(f"--tune times the lowerings on {provider.title}, which is not here: {problem}")
    if plan.dtype not in provider.dtypes:
        raise CompileError(f"--tune: ONNX Runtime runs no {plan.dtype} on {provider.title}: there is nothing to time")


def _candidates(
    target: str, choices: Choices, masks: Masks, config: DecoderConfig, costs: SelectionCosts
) -> Iterator[tuple[str, Plan]]:
    """The lowerings that the target can run and that differ for these masks."""
    nothing_to_fill = not sets_to_fill(masks, config, costs)
    for lowering in LOWERINGS.values():
        if lowering.unfilled and nothing_to_fill:
            continue
        with suppress(CompileError):  # of the lowering: the same choices with the default one have made a plan
            yield lowering.name, replace(make_plan(target, replace(choices, lowering=lowering.name)), costs=costs)


def _part_widths(block: Block, hidden_size: int) -> list[int]:
    """Widths of the reads and writes of a block that are neither empty nor everything."""
    sides = [side for layer in block.sub_layers.values() for side in (layer.read, layer.write)]
    return [len(side) for side in sides if 0 < len(side) < hidden_size]


@contextmanager
def _artifacts(part: Checkpoint, masks: Masks, plans: dict[str, Plan], build: Build) -> Iterator[dict[str, Path]]:
    with tempfile.TemporaryDirectory(prefix="dispc-tune-") as scratch:
        artifacts = {name: Path(scratch) / name for name in plans}
        for name, plan in plans.items():
            artifacts[name].mkdir()
            build(part, masks, plan, artifacts[name])
        yield artifacts


def time_lowerings(artifacts: dict[str, Path], plan: Plan, positions: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a prompt and of a token for each artifact of a model that takes so many positions."""
    from dispc.runtime.latency import LatencyOptions, TimedArtifact, time_case

    options = LatencyOptions(threads=os.cpu_count() or 1)
    prompt, past = min(PROMPT, positions // 2), min(PAST, positions // 2)

    def load(path: Path, graph: bool = False) -> TimedArtifact:
        return TimedArtifact(path, PROVIDERS[plan.target.provider], options.threads, graph)

    ballast = load(next(iter(artifacts.values())))  # what is loaded first was seen to be 2 to 4 % slower
    loaded = {
        name: [load(path)] + ([load(path, graph=True)] if plan.cuda_graph else []) for name, path in artifacts.items()
    }
    milliseconds: dict[str, dict[str, float]] = {name: {} for name in artifacts}
    for kind, length, label in (("first token", prompt, PREFILL), ("one token", past, DECODING)):
        for row in time_case(loaded, kind, 1, length, options):  # of two rows that with the CUDA graph is the last
            milliseconds[row.artifact][label] = round(row.p50, 4)
    del ballast
    return milliseconds
