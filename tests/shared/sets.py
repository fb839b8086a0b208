"""Masks that several test modules take: half of everything, nearly everything, any widths."""

from typing import Any

import harness
import numpy as np
import torch
from hypothesis import strategies as st

from dispc.lowerings import LOWERINGS
from dispc.masks import SETS, Masks, set_width
from dispc.targets import TARGETS


def masks_of(variant: str) -> Masks:
    """Half of the parameters, but nearly everything is read by every MLP: there is something to fill with zeros."""
    config = harness.checkpoint(variant).config
    nearly = {"mlp.read": np.arange(1, config.hidden_size)}
    return Masks.from_indices([block.sets() | nearly for block in Masks.random(config, 0.5, 3).blocks], config)


def targets_of(lowering: str) -> list[str]:
    """The targets that have a lowering, in float32."""
    row = LOWERINGS[lowering]
    found = TARGETS.values()
    return [t.name for t in found if row.runs(t.provider, "float32") and (t.contrib or not row.domain)]


def half(variant: str, seed: int = 1, **options: Any) -> Masks:
    return Masks.random(harness.checkpoint(variant).config, 0.5, seed, **options)


@st.composite
def widths(draw: st.DrawFn, variant: str) -> Masks:
    """Masks of any widths: 0, 1, odd, full, all different per sub-layer, in either norm scope."""
    config = harness.checkpoint(variant).config
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = []
    for _ in range(config.num_hidden_layers):
        block = {}
        for name in SETS:
            full = set_width(name, config.hidden_size, config.intermediate_size)
            count = draw(st.one_of(st.sampled_from([0, 1, full - 1, full, full]), st.integers(1, full)))
            block[name] = np.sort(rng.choice(full, count, replace=False))
        blocks.append(block)
    return Masks.from_indices(blocks, config, norm_scope=draw(st.sampled_from(["full", "selected"])))


def gates_of(masks: Masks) -> torch.Tensor:
    """The sets as one 0/1 vector, as the hypernetwork would choose them."""
    pieces = []
    for block in masks.blocks:
        for name, indices in block.sets().items():
            piece = torch.zeros(set_width(name, masks.hidden_size, masks.intermediate_size))
            piece[torch.from_numpy(indices)] = 1.0
            pieces.append(piece)
    return torch.cat(pieces)
