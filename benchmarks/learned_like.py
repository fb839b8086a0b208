"""Masks with the widths that DISP-LLM learns, for checkpoints of random weights.

Figure 6 of the paper (LLaMA-2-7B, half pruned): the read and write sets of the MLP keep 0.8 to 1.0, its mid set 0.25 to
0.65, and attention nearly vanishes in several late blocks. What attention keeps elsewhere is a guess.
"""

import numpy as np
import numpy.typing as npt

from dispc.masks import SETS, Masks, set_width
from dispc.model.config import DecoderConfig

Shares = npt.NDArray[np.float64]


def learned_like(config: DecoderConfig, kept: float, seed: int) -> Masks:
    """Masks that keep the share `kept` (above 0, below 1) of the block parameters, up to rounding of the widths.

    The share of each set is drawn as in the figure, then raised to one common power that meets the budget.
    """
    rng, blocks = np.random.default_rng(seed), config.num_hidden_layers
    shares = _draw(rng, blocks)
    budget = kept * config.block_parameters * blocks
    low, high = 0.0, 64.0
    for _ in range(60):
        power = (low + high) / 2
        counts = {name: _counts(name, share**power, config) for name, share in shares.items()}
        low, high = (power, high) if _parameters(counts, config) > budget else (low, power)
    rows = [
        {name: rng.choice(_width(name, config), counts[name][block], replace=False) for name in SETS}
        for block in range(blocks)
    ]
    metadata = {
        "method": "learned-like widths",
        "pruning_ratio": f"{1 - kept:.4g}",
        "ratio_of": "blocks",
        "seed": str(seed),
    }
    return Masks.from_indices(rows, config, metadata=metadata)


def _draw(rng: np.random.Generator, blocks: int) -> dict[str, Shares]:
    """A share for each set of each block."""
    attention = _spread(rng, 0.7, 1.0, 2 * blocks)
    vanishing = blocks // 2 + rng.choice(blocks - blocks // 2, blocks // 4, replace=False)
    attention[vanishing] = _spread(rng, 0.01, 0.05, len(vanishing))
    attention[vanishing + blocks] = _spread(rng, 0.01, 0.05, len(vanishing))
    stream = _spread(rng, 0.8, 1.0, 2 * blocks)
    return {
        "attention.read": attention[:blocks],
        "attention.write": attention[blocks:],
        "mlp.read": stream[:blocks],
        "mlp.mid": _spread(rng, 0.25, 0.65, blocks),
        "mlp.write": stream[blocks:],
    }


def _spread(rng: np.random.Generator, low: float, high: float, count: int) -> Shares:
    """`count` different shares in random order, one from each of `count` equal parts of the range."""
    return low + (high - low) * (rng.permutation(count) + rng.uniform(0.25, 0.75, count)) / max(count, 1)


def _width(name: str, config: DecoderConfig) -> int:
    return set_width(name, config.hidden_size, config.intermediate_size)


def _counts(name: str, shares: Shares, config: DecoderConfig) -> npt.NDArray[np.int64]:
    width = _width(name, config)
    return np.clip(np.round(shares * width), 1, width).astype(np.int64)


def _parameters(counts: dict[str, npt.NDArray[np.int64]], config: DecoderConfig) -> int:
    attention = config.attention_parameters(counts["attention.read"], counts["attention.write"])
    mlp = config.mlp_parameters(counts["mlp.read"], counts["mlp.mid"], counts["mlp.write"])
    return int(np.sum(attention + mlp))
