"""What an artifact stores of each weight, so that the reference can round the same numbers.

Some weights are stored after arithmetic: norms that add 1, projections with a folded multiplier, norms after
sub-layers that run over another number of positions. `((w + offset) * factor)` is rounded there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dispc.masks import Masks
from dispc.model.config import DecoderConfig


@dataclass(frozen=True)
class Arithmetic:
    """How a stored number is computed from a weight."""

    offset: float = 0.0
    factor: float = 1.0

    def stored(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The number that is stored."""
        return ((weight + self.offset) * self.factor).to(dtype)

    def weight(self, stored: Tensor) -> Tensor:
        """The weight in float32 that a stored number stands for."""
        return stored.float() / self.factor - self.offset


@dataclass(frozen=True)
class Storage:
    """What an artifact of `masks` stores; `norm_widths` are the positions that its norms run over, by their names."""

    config: DecoderConfig
    masks: Masks
    norm_widths: Mapping[str, int]

    def arithmetic(self, part: nn.Module, index: int | None) -> dict[str, Arithmetic]:
        """Of the parameters of block `index`, or with None of those outside of the blocks; others are stored as is."""
        family = self.config.family
        changed = {
            f"{name}.weight": Arithmetic(offset=family.norm.offset)
            for name, module in part.named_modules()
            if family.norm.describes(module)
        }
        if index is None:
            return changed if self.config.tied else changed | self._head(part)
        for name, names in family.sub_layers.items():
            folded = Arithmetic(factor=self.config.residual_multiplier)
            changed |= {f"{names.write}.weight": folded, f"{names.write}.bias": folded}
            if names.after:
                width = self.norm_widths.get(f"{family.block(index)}.{names.after}.weight", 0)
                counted = self.masks.hidden_size
                if self.masks.norm_scope == "selected":
                    counted = len(self.masks.blocks[index].sub_layers[name].write)
                share = counted / width if width and counted else 1.0
                changed[f"{names.after}.weight"] = Arithmetic(family.norm.offset, math.sqrt(share))
        return changed

    def _head(self, model: Any) -> dict[str, Arithmetic]:
        head = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is head)
        return {f"{name}.weight": Arithmetic(factor=self.config.logits_multiplier)}

    def round(self, part: Any, index: int | None, dtype: torch.dtype) -> None:
        """Round, in place, what is stored in `dtype`: weights, cosines and sines, and multipliers that are nodes.

        A widened artifact then differs from this reference by the rounding of float32 only.
        """
        arithmetic = self.arithmetic(part, index)
        blocks = f"{self.config.family.layers}."
        for name, parameter in part.named_parameters():
            if index is None and name.startswith(blocks):
                continue
            made = arithmetic.get(name, Arithmetic())
            parameter.data = made.weight(made.stored(parameter.data, dtype))
        for module in part.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.register_forward_hook(lambda m, x, y: tuple(value.to(dtype).to(value.dtype) for value in y))
        if index is None:
            _round_multiplier(part.get_input_embeddings(), self.config.embedding_multiplier, dtype)
            if self.config.tied:
                _round_multiplier(part.get_output_embeddings(), self.config.logits_multiplier, dtype)


def _round_multiplier(module: nn.Module, multiplier: float, dtype: torch.dtype) -> None:
    """Scale a module's outputs, so that the model's later multiplication acts as if its multiplier were rounded."""
    ratio = float(torch.tensor(multiplier).to(dtype)) / multiplier
    if ratio != 1.0:
        module.register_forward_hook(lambda m, x, y: y * ratio)
