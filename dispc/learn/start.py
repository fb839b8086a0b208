"""Where learning begins: with all latents equal, as in the paper, or in the order of an instant method's scores."""

import gc

import numpy as np
import torch
from torch import Tensor

from dispc.learn.budget import position_costs
from dispc.learn.distributed import Processes
from dispc.learn.instant import WINDOWS, Progress, Scores, Subject, score_positions
from dispc.learn.options import LearnOptions
from dispc.masks import set_widths
from dispc.model.checkpoint import Checkpoint
from dispc.model.config import DecoderConfig
from dispc.model.text import TextTokens
from dispc.support.errors import MasksError

TOKENS = 16_384
"""A method reads at least WINDOWS sequences of the run's length, and more until it has so many tokens."""
SLOPE, CUT, LOWEST, HIGHEST = 12.0, -1.0, -5.0, 0.5
"""Latents begin on a line that is CUT where as much ranks lower as is to go, and that ends at LOWEST and HIGHEST. With
the paper's offset of 3, about as much is off in the first step as is to go (decision 0010)."""


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
        subject = Subject.of(
            checkpoint,
            read,
            processes.device,
            seed=options.seed,
            norm_scope=options.norm_scope,
            checkpointing=options.activation_checkpointing,
            progress=progress,
        )
        latents.copy_(ranked(score_positions(options.start_from, subject), checkpoint.config, pruned))
        gc.collect()  # the model refers to itself, and the run's own comes next
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
    return processes.from_main(latents)


def ranked(scores: Scores, config: DecoderConfig, pruned: float) -> Tensor:
    """Latents [sum of set widths] in the order of `scores`: CUT where what ranks lower has the share `pruned` of costs.

    A parameter counts twice in costs, for its row and for its column: where both lose a share p, 1 - (1 - p)^2 of the
    parameters go. That is made up for by the gates that are off by chance above the cut, and on below.
    """
    if not np.isfinite(scores).all():
        raise MasksError("a score is not a number; look for weights that are NaN or infinite")
    costs = np.repeat(position_costs(config) * config.num_hidden_layers, set_widths(config)).astype(np.float64)
    _, rank = np.unique(scores, return_inverse=True)  # equal scores begin equal
    lower = np.cumsum(np.bincount(rank, weights=costs)) / costs.sum()
    return torch.from_numpy(np.clip(SLOPE * (lower[rank] - pruned) + CUT, LOWEST, HIGHEST)).float()
