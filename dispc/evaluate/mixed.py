"""Which products keep 8 bits when the others get 4: by a rule that knows the widths, or by the loss that each adds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from dispc.algorithms import ALGORITHMS, NEAREST
from dispc.evaluate.perplexity import negative_log_likelihood, text_windows
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.config import DecoderConfig
from dispc.plan import Plan
from dispc.quantisation import HEAD_PRODUCT, Quantisation
from dispc.reference.blocks import Blocks
from dispc.reference.integers import PrunedWeight
from dispc.reference.masked import load_reference
from dispc.reference.quantised import products, round_weight, untie
from dispc.selection import widths_beside
from dispc.support.arrays import Tokens
from dispc.support.errors import CompileError

BUDGET = 0.14
"""Share of the 4-bit artifact's bytes that 8-bit products may add; scales, norms and graph make it 15 % at most."""
SCALE_BYTES = 4
WINDOW, WINDOWS, DAMAGE_WINDOWS = 512, 32, 2
"""Tokens of a window of the text; windows that GPTQ reads, and that each product's damage is measured on."""
Progress = Callable[[str, int, int], None]


def settle_quantisation(
    checkpoint: Checkpoint, masks: Masks, plan: Plan, data: str | None, progress: Progress
) -> tuple[Plan, Tokens]:
    """The plan with the products that keep 8 bits chosen, and the windows [N,S] of the text `data`, if it has one.

    Raises:
        DispcError: when a text is wanted and missing, given and not wanted, or cannot be read.
    """
    quantisation, config = plan.quantisation, checkpoint.config
    if (quantisation is not None and quantisation.wants_text) != (data is not None):
        readers = "/".join(row.name for row in ALGORITHMS.values() if row.reads_text)
        wanted = f"--algorithm {readers} and --mixed damage"
        raise CompileError(f"--data is for {wanted}; leave it out" if data else f"{wanted} look at a text: --data FILE")
    windows = np.zeros((0, 0), dtype=np.int64)
    if data is not None:
        windows = text_windows(data, checkpoint.directory, config.max_positions, min(WINDOW, config.max_positions))
    if quantisation is None or quantisation.mixed is None or quantisation.int8:
        return plan, windows[:WINDOWS]
    if quantisation.mixed == "widths":
        chosen = by_widths(masks, config, quantisation)
    else:
        chosen = by_damage(checkpoint, masks, quantisation, windows[-DAMAGE_WINDOWS:], progress)
    return replace(plan, quantisation=replace(quantisation, int8=chosen)), windows[:WINDOWS]


def weights_of(masks: Masks, config: DecoderConfig, quantisation: Quantisation) -> dict[str, int]:
    """The weights that are left in each product, by its name."""
    weights = {
        f"{number}.{name}": len(block.sets()[name]) * beside
        for number, block in enumerate(masks.blocks)
        for name, beside in widths_beside(block, config).items()
        if block.sub_layers[name.partition(".")[0]].alive
    }
    if quantisation.head and not (quantisation.embedding and config.tied):  # the embedding's integers have one width
        weights[HEAD_PRODUCT] = config.vocab_size * config.hidden_size
    return weights


def by_widths(masks: Masks, config: DecoderConfig, quantisation: Quantisation) -> tuple[str, ...]:
    """The products that are worth most by experience, as many as the budget pays for.

    What the MLPs write and what the attentions read, of the first and the last eighth of the blocks and of every third
    block between (onnxruntime-genai's rule); then of all other blocks; smaller products first, for a narrow product
    costs less and loses as much.
    """
    weights, count = weights_of(masks, config, quantisation), len(masks.blocks)
    outer = {number for number in range(count) if number < count // 8 or number >= count - count // 8}
    third = {number for number in range(count) if (number - count // 8) % 3 == 2}

    def rank(name: str) -> tuple[bool, bool, int]:
        number, _, side = name.partition(".")
        first = side in ("mlp.write", "attention.read")
        return (not first, int(number) not in outer | third, weights[name])

    blocks = [name for name in weights if name != HEAD_PRODUCT]
    return _within_budget(sorted(blocks, key=rank), weights, plain_bytes(masks, config, quantisation))


def by_damage(
    checkpoint: Checkpoint,
    masks: Masks,
    quantisation: Quantisation,
    windows: Tokens,
    progress: Progress = lambda what, done, total: None,
) -> tuple[str, ...]:
    """The products whose rounding to 4 bits, alone, adds most to the loss on `windows` [N,S] for each weight."""
    config = checkpoint.config
    weights = weights_of(masks, config, quantisation)
    model = load_reference(checkpoint, masks)
    untie(model)
    plain = replace(quantisation, mixed=None, int8=(), algorithm=NEAREST)
    with torch.no_grad():
        parts, damage = products(model, config.family, masks), {}
        blocks = Blocks(model, config)
        texts = [_Text(blocks, window) for window in windows]
        base = _loss(texts, len(blocks))
        for done, name in enumerate(weights):
            progress("measuring damage", done, len(weights))
            block = len(blocks) if name == HEAD_PRODUCT else int(name.partition(".")[0])
            with _rounded(parts[name], plain):
                damage[name] = _loss(texts, block) - base
    order = sorted((name for name in weights if damage[name] > 0), key=lambda name: -damage[name] / weights[name])
    return _within_budget(order, weights, plain_bytes(masks, config, quantisation))


def plain_bytes(masks: Masks, config: DecoderConfig, quantisation: Quantisation) -> float:
    """Bytes of the weights with 4 bits everywhere: what the budget is a share of."""
    each = quantisation.bits / 8 + SCALE_BYTES / quantisation.block_size
    table, blocks = config.vocab_size * config.hidden_size, masks.kept_parameters(config)
    apart = [quantisation.embedding, quantisation.head]
    if config.tied and quantisation.embedding == quantisation.head:
        del apart[0]
    return blocks * each + sum(table * (each if quantised else 4) for quantised in apart)


def _within_budget(order: list[str], weights: Mapping[str, int], plain: float) -> tuple[str, ...]:
    left, chosen = BUDGET * plain, []
    for name in order:
        if weights[name] / 2 <= left:  # four bits more for each
            left -= weights[name] / 2
            chosen.append(name)
    return tuple(sorted(chosen))


class _Text:
    """A window of tokens [S], and what enters each block [1,S,d] when no weight is rounded."""

    def __init__(self, blocks: Blocks, tokens: Tokens) -> None:
        self.blocks, self.tokens = blocks, tokens
        self.entered = blocks.enter(tokens, 0, _as_it_is)
        self.streams = [self.entered.hidden]
        for index in range(len(blocks)):
            self.streams.append(blocks.run(index, self.streams[-1], self.entered))

    def loss(self, first: int) -> float:
        """Mean loss per token, blocks from `first` on run again: what is before a rounded weight stays."""
        hidden = self.streams[first]
        for index in range(first, len(self.blocks)):
            hidden = self.blocks.run(index, hidden, self.entered)
        hidden = self.blocks.leave(self.tokens, 0, _as_it_is, hidden)
        logits = self.blocks.logits(hidden, _as_it_is)
        return float(negative_log_likelihood(logits[:-1].numpy(), self.tokens[1:]).mean())


def _as_it_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _loss(texts: Sequence[_Text], first: int) -> float:
    return sum(text.loss(first) for text in texts) / len(texts)


@contextmanager
def _rounded(parts: Sequence[PrunedWeight], quantisation: Quantisation) -> Iterator[None]:
    """The weights of one product, rounded within the context."""
    kept = [part.weight.clone() for part in parts]
    for part in parts:
        round_weight(part.weight, part.inputs, quantisation, torch.float32)
    try:
        yield
    finally:
        for part, weight in zip(parts, kept, strict=True):
            part.weight.copy_(weight)
