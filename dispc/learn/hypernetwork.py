"""The hypernetwork: a few million weights that produce all latents, so that sets are learned together.

Shapes: V selection vectors, N_l the width of vector l.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dispc.masks import SETS, set_width
from dispc.model.config import DecoderConfig

INPUT_SIZE, GRU_SIZE = 32, 64
SHARED = tuple(name for name in SETS if name != "mlp.mid")


@dataclass(frozen=True)
class Layout:
    """Which selection vector serves which set.

    `widths` [V] are the widths of the vectors; `vectors` has for every set, block after block in the order of `SETS`,
    the vector it uses.
    """

    widths: tuple[int, ...]
    vectors: tuple[int, ...]

    @staticmethod
    def make(config: DecoderConfig, *, constrained: bool = False) -> "Layout":
        """One vector per set; `constrained`: one vector for S1, S2, S3 and S5 of all blocks, as pruning that must keep
        the residual stream whole would have it (the paper's ablation)."""
        widths: list[int] = [config.hidden_size] if constrained else []
        vectors = []
        for _ in range(config.num_hidden_layers):
            for name in SETS:
                if constrained and name in SHARED:
                    vectors.append(0)
                else:
                    vectors.append(len(widths))
                    widths.append(set_width(name, config.hidden_size, config.intermediate_size))
        return Layout(tuple(widths), tuple(vectors))

    def expand(self, vectors: Tensor) -> Tensor:
        """Values of all vectors [sum of N_l] to values of all sets, block after block [sum of set widths]."""
        pieces = torch.split(vectors, list(self.widths))
        return torch.cat([pieces[index] for index in self.vectors])

    def collect(self, values: Tensor) -> Tensor:
        """Values of all sets [sum of set widths] to values of all vectors [sum of N_l]: the mean where sets share."""
        pieces: list[list[Tensor]] = [[] for _ in self.widths]
        sizes = [self.widths[vector] for vector in self.vectors]
        for vector, piece in zip(self.vectors, torch.split(values, sizes), strict=True):
            pieces[vector].append(piece)
        return torch.cat([torch.stack(sharing).mean(0) for sharing in pieces])


class HyperNetwork(nn.Module):
    """Fixed random inputs -> bidirectional GRU over the vectors -> LayerNorm -> GELU -> one linear map per vector.

    Without `gru` a linear layer stands in its place (the paper's ablation): vectors no longer see each other.
    """

    inputs: Tensor

    def __init__(self, widths: Sequence[int], *, gru: bool = True) -> None:
        super().__init__()
        self.register_buffer("inputs", torch.randn(len(widths), INPUT_SIZE))
        self.gru = nn.GRU(INPUT_SIZE, GRU_SIZE, bidirectional=True) if gru else None
        self.linear = None if gru else nn.Linear(INPUT_SIZE, 2 * GRU_SIZE)
        self.norm = nn.LayerNorm(2 * GRU_SIZE)
        self.heads = nn.ModuleList(nn.Linear(2 * GRU_SIZE, width, bias=False) for width in widths)

    def forward(self) -> Tensor:
        """Latents of all vectors, [sum of N_l]."""
        if self.gru is not None:
            h, _ = self.gru(self.inputs)
        else:
            assert self.linear is not None
            h = self.linear(self.inputs)
        h = functional.gelu(self.norm(h))
        return torch.cat([head(row) for head, row in zip(self.heads, h, strict=True)])


class FreeLatents(nn.Module):
    """No hypernetwork (the paper's ablation): every latent is a parameter of its own, starting at zero."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(sum(widths)))

    def forward(self) -> Tensor:
        """Latents of all vectors, [sum of N_l]."""
        return self.latents * 1.0


class Started(nn.Module):
    """The latents of a source on top of those with which learning begins, first [sum of N_l]."""

    first: Tensor

    def __init__(self, source: nn.Module, first: Tensor) -> None:
        super().__init__()
        self.source = source
        self.register_buffer("first", first)

    def forward(self) -> Tensor:
        """Latents of all vectors, [sum of N_l]."""
        latents: Tensor = self.first + self.source()
        return latents
