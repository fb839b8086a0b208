"""Where learning begins: with all latents equal, as in the paper, or in the order of an instant method's scores."""

import numpy as np
import torch
from torch import Tensor

from dispc.learn.budget import position_costs
from dispc.learn.distributed import Processes
from dispc.learn.instant import WINDOWS, Progress, Scores, score_positions
from dispc.learn.options import LearnOptions
from dispc.masks import set_widths
from dispc.model.checkpoint import Checkpoint
from dispc.model.config import DecoderConfig
from dispc.model.text import TextTokens
from dispc.support.errors import MasksError

TOKENS = 16_384
"""A method reads WINDOWS sequences of the run's length, or more of them where those are fewer tokens."""
SLOPE, LOWEST, HIGHEST = 12.0, -4.0, 1.5
"""Latents begin on a line through 0 at the cut, and no further from it (decision 0010)."""


def first_latents(
    options: LearnOptions,
    checkpoint: Checkpoint,
    rows: TextTokens,
    pruned: float,
    processes: Processes,
    progress: Progress,
) -> Tensor:
    """The latents of all sets [sum of set widths] with which a ranked run begins, equal in all processes.

    The main process scores the positions by the first of rows [n,S]: the dense model must fit on its device, in
    float32. `pruned` is the share of the block parameters that goes.

    Raises:
        MasksError: when a score is not a number.
    """
    assert options.start_from is not None
    latents = torch.zeros(sum(set_widths(checkpoint.config)), device=processes.device)
    if processes.main:
        read = rows[: max(WINDOWS, TOKENS // options.sequence_length)]
        scores = score_positions(
            options.start_from, checkpoint, read, processes.device, seed=options.seed, progress=progress
        )
        latents.copy_(ranked(scores, checkpoint.config, pruned))
    return processes.same(latents)


def ranked(scores: Scores, config: DecoderConfig, pruned: float) -> Tensor:
    """Latents [sum of set widths] in the order of `scores`: 0 where `pruned`, a share of the parameters, lies below."""
    if not np.isfinite(scores).all():
        raise MasksError("a score is not a number; look for weights that are NaN or infinite")
    costs = np.repeat(position_costs(config) * config.num_hidden_layers, set_widths(config)).astype(np.float64)
    order = np.argsort(scores, kind="stable")
    below = np.empty(len(scores))
    below[order] = np.cumsum(costs[order]) / costs.sum()
    return torch.from_numpy(np.clip(SLOPE * (below - pruned), LOWEST, HIGHEST)).float()
