"""Packed projections, shown as separate ones: modules of a model, and tensors of a checkpoint.

Some families keep several projections in one linear layer (Phi-3's `qkv_proj`, Pythia's `query_key_value`), while sets,
passes, the reference and learning handle each separately.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dispc.model.config import DecoderConfig
from dispc.model.family import Family, Packed
from dispc.model.storage import CheckpointTensor


def rows(packed: Packed, part: str, config: DecoderConfig) -> npt.NDArray[np.int64]:
    """The rows of the packed weight that are those of `part`, in its order."""
    sizes = [config.outputs(name) for name in packed.parts]
    number = packed.parts.index(part)
    every = np.arange(sum(sizes))
    if packed.per_head:
        return every.reshape(config.num_attention_heads, len(sizes), config.head_dim)[:, number].ravel()
    return np.split(every, np.cumsum(sizes)[:-1])[number]


@dataclass(frozen=True)
class PackedPart:
    """A parameter that is stored as rows of another: the name of that one, and where in it."""

    name: str
    packed: Packed
    part: str


def packed_in(name: str, family: Family) -> PackedPart | None:
    """Where the parameter `name` of a separate projection is stored; None for one that is stored separately."""
    for packed in family.packed:
        for part in packed.parts:
            block, found, kind = name.rpartition(f".{part}.")
            if found:
                return PackedPart(f"{block}.{packed.module}.{kind}", packed, part)
    return None


def take(whole: CheckpointTensor, place: PackedPart, config: DecoderConfig) -> CheckpointTensor:
    """The rows of a stored tensor that are those of a separate projection, read when asked for.

    Raises:
        CheckpointError: when it has not as many rows as the projections in it.
    """
    every = sum(config.outputs(name) for name in place.packed.parts)
    kept = torch.from_numpy(rows(place.packed, place.part, config))
    whole.expect((every, *whole.shape[1:]))
    return replace(whole, shape=(len(kept), *whole.shape[1:]), read=lambda: whole.read()[kept])


def separate(model: nn.Module, config: DecoderConfig) -> None:
    """Give a transformers model separate projections in the place of its packed ones; it computes the same."""
    for index in range(len(model.get_submodule(config.family.layers))):  # type: ignore[arg-type]
        for packed in config.family.packed:
            _separate(model.get_submodule(config.family.block(index)), packed, config)


def _separate(block: nn.Module, packed: Packed, config: DecoderConfig) -> None:
    whole: Any = block.get_submodule(packed.module)
    parts = []
    for name in packed.parts:
        kept = torch.from_numpy(rows(packed, name, config))
        part = nn.Linear(whole.in_features, len(kept), bias=whole.bias is not None, device="meta")
        for kind, parameter in whole.named_parameters():
            setattr(part, kind, nn.Parameter(parameter.detach()[kept], requires_grad=parameter.requires_grad))
        owner, _, attribute = name.rpartition(".")
        block.get_submodule(owner).add_module(attribute, part)
        parts.append(part)
    owner, _, attribute = packed.module.rpartition(".")
    setattr(block.get_submodule(owner), attribute, Pack(parts, config.num_attention_heads if packed.per_head else 1))


class Pack(nn.Module):
    """The outputs of separate projections as the packed one orders them, with x [..., K] -> [..., all rows].

    The projections are modules of the block, not of this one. `heads` is 1 where each of them is in one piece.
    """

    def __init__(self, parts: list[nn.Linear], heads: int) -> None:
        super().__init__()
        self.parts, self.heads = tuple(parts), heads

    def forward(self, x: Tensor) -> Tensor:
        pieces = [part(x).unflatten(-1, (self.heads, -1)) for part in self.parts]
        return torch.cat(pieces, dim=-1).flatten(-2)
