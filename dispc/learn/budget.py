"""The parameter budget: what is counted, the regulariser that leads to it, and the final sets that meet it exactly."""

import itertools
import math
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dispc.masks import SETS, Masks, NormScope, set_widths
from dispc.model.checkpoint import Checkpoint
from dispc.model.config import DecoderConfig
from dispc.model.family import HEAD
from dispc.support.errors import MasksError

RatioOf = Literal["blocks", "model"]


def block_budget(checkpoint: Checkpoint, ratio: float, ratio_of: RatioOf) -> int:
    """Block parameters that may stay when `ratio` of the block (or of all) parameters goes.

    Raises:
        MasksError: when the ratio lies outside (0, 1), is of something unknown, or is of the whole model and more
            than all blocks hold; or when the model is pruned already.
    """
    if checkpoint.own_masks is not None:
        raise MasksError(f"{checkpoint.directory}: is pruned already; give the dense model that it was made from")
    if ratio_of not in get_args(RatioOf):
        raise MasksError(f"ratio_of is {ratio_of!r}; choose one of {', '.join(get_args(RatioOf))}")
    if not 0.0 < ratio < 1.0:
        raise MasksError(f"the pruning ratio is {ratio:g}; it must lie between 0 and 1, both excluded")
    blocks = checkpoint.config.all_block_parameters
    if ratio_of == "blocks":
        return round((1.0 - ratio) * blocks)
    total = model_parameters(checkpoint)
    budget = blocks - round(ratio * total)
    if budget <= 0:
        raise MasksError(
            f"{ratio:g} of the model's {total:,} parameters cannot be pruned: its blocks hold {blocks:,}; "
            f"choose less than {blocks / total:.2f}, or --ratio-of blocks"
        )
    return budget


def check_fits(config: DecoderConfig, budget: int, align: int, *, constrained: bool = False) -> None:
    """Raise MasksError where no sets fit `budget`, whatever is learned; checked before the work starts.

    The least that anything keeps is one sub-layer of the narrowest sets; `constrained`, the attention of every block.
    """
    side, middle = min(align, config.hidden_size), min(align, config.intermediate_size)
    attention, mlp = config.attention_parameters(side, side), config.mlp_parameters(side, middle, side)
    least = attention * config.num_hidden_layers if constrained else min(attention, mlp)
    if least > budget:
        raise _nothing_fits(budget)


def _nothing_fits(budget: int) -> MasksError:
    return MasksError(f"no set of positions fits a budget of {budget:,} block parameters")


def budget_facts(masks: Masks, checkpoint: Checkpoint, ratio_of: RatioOf) -> dict[str, str]:
    """The metadata that says what masks keep, and which share of `ratio_of` they prune."""
    config = checkpoint.config
    kept, blocks = masks.kept_parameters(config), config.all_block_parameters
    whole = blocks if ratio_of == "blocks" else model_parameters(checkpoint)
    reached = f"{(blocks - kept) / whole:.6f}"
    return {"ratio_of": ratio_of, "ratio_reached": reached, "kept_parameters": str(kept)}


def model_parameters(checkpoint: Checkpoint) -> int:
    """Parameters of the whole model; a tied embedding counts once."""
    tensors = checkpoint.tensors.items()
    tied = {f"{checkpoint.family.head}.weight", HEAD} if checkpoint.config.tied else set()
    return sum(math.prod(t.shape) for name, t in tensors if name not in tied)


def kept_parameters(gates: Tensor, config: DecoderConfig) -> Tensor:
    """T(s) of the paper, differentiable: block parameters that the 0/1 gates of all sets [sum of widths] keep."""
    counts = torch.stack([piece.sum() for piece in torch.split(gates, set_widths(config))]).view(-1, len(SETS))
    read, write, mlp_read, mid, mlp_write = counts.unbind(1)
    kept: Tensor = config.attention_parameters(read, write) + config.mlp_parameters(mlp_read, mid, mlp_write)
    return kept.sum()


def position_costs(config: DecoderConfig) -> tuple[int, ...]:
    """Block parameters that one position of each set costs, in the order of `SETS`, while the others are whole."""
    hidden, middle = config.hidden_size, config.intermediate_size
    attention, mlp = config.attention_parameters, config.mlp_parameters
    return (
        attention(hidden, hidden) - attention(hidden - 1, hidden),
        attention(hidden, hidden) - attention(hidden, hidden - 1),
        mlp(hidden, middle, hidden) - mlp(hidden - 1, middle, hidden),
        mlp(hidden, middle, hidden) - mlp(hidden, middle - 1, hidden),
        mlp(hidden, middle, hidden) - mlp(hidden, middle, hidden - 1),
    )


def regulariser(kept: Tensor, budget: float) -> Tensor:
    """R(T(s), p T) = log(max / min): zero at the budget, as steep below as above it."""
    return torch.log(kept.clamp(min=1.0) / budget).abs()


def final_sets(
    latents: npt.NDArray[np.floating],
    config: DecoderConfig,
    budget: int,
    *,
    align: int = 1,
    norm_scope: NormScope = "full",
    groups: tuple[int, ...] | None = None,
) -> Masks:
    """The sets with the highest latents that fit the budget; the same latents always give the same sets.

    Every set is cut into runs of `align` positions in falling order of latent (the last may be shorter). All runs are
    taken best mean first; one that would exceed `budget` is left out and ends its set. Seen from the signs of
    the latents that is trimming or growing by latent value; every width is a multiple of `align`, or full.

    Args:
        latents: of all sets, block after block, [sum of set widths].
        groups: for every set the vector it shares with others (`Layout.vectors`): those grow together.

    Raises:
        MasksError: when nothing fits the budget, or a latent is not a number.
    """
    widths = set_widths(config)
    groups = groups or tuple(range(len(widths)))
    starts = np.concatenate([[0], np.cumsum(widths)])
    for number, (a, b) in enumerate(itertools.pairwise(starts)):
        if not np.isfinite(latents[a:b]).all():
            where = f"block {number // len(SETS)}, {SETS[number % len(SETS)]}"
            raise MasksError(f"{where}: a score is not a number; look for weights that are NaN or infinite")
    orders = [np.argsort(-latents[a:b], kind="stable") for a, b in itertools.pairwise(starts)]
    runs = []
    for group, number in {group: number for number, group in enumerate(groups)}.items():
        ranked = latents[starts[number] : starts[number + 1]][orders[number]]
        value = math.inf
        for at in range(0, len(ranked), align):
            piece = ranked[at : at + align]
            value = min(value, float(piece.mean()))  # rounded, the mean of equal latents may be above the one before
            runs.append((-value, group, at, len(piece)))
    runs.sort()

    kept = _fill([(group, count) for _, group, _, count in runs], groups, budget, config)
    if _parameters(kept, config) == 0:
        raise _nothing_fits(budget)
    chosen = [order[:width] for order, width in zip(orders, kept, strict=True)]
    blocks = [dict(zip(SETS, chosen[at : at + len(SETS)], strict=True)) for at in range(0, len(chosen), len(SETS))]
    return Masks.from_indices(blocks, config, norm_scope=norm_scope)


def _fill(runs: list[tuple[int, int]], groups: tuple[int, ...], budget: int, config: DecoderConfig) -> list[int]:
    """Widths of all sets once the (group, length) runs are taken in order as far as they fit."""

    def widths(taken: npt.NDArray[np.float64]) -> list[int]:
        return [int(taken[group]) for group in groups]

    owner, length = np.array(runs).T
    size = max(groups) + 1

    def prefix(count: int) -> npt.NDArray[np.float64]:
        return np.bincount(owner[:count], weights=length[:count], minlength=size).astype(np.float64)

    low, high = 0, len(runs)  # parameters grow with the runs taken: bisect for the longest prefix that fits
    while low < high:
        middle = (low + high + 1) // 2
        fits = _parameters(widths(prefix(middle)), config) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    taken, full = prefix(low), set[int]()
    for group, count in runs[low:]:
        if group in full:
            continue
        taken[group] += count
        if _parameters(widths(taken), config) > budget:
            taken[group] -= count
            full.add(group)
    return widths(taken)


def _parameters(widths: list[int], config: DecoderConfig) -> int:
    total = 0
    for at in range(0, len(widths), len(SETS)):
        read, write, mlp_read, mid, mlp_write = widths[at : at + len(SETS)]
        if read and write:
            total += config.attention_parameters(read, write)
        if mlp_read and mid and mlp_write:
            total += config.mlp_parameters(mlp_read, mid, mlp_write)
    return total
