"""The masked reference: the dense torch model with the sets applied as 0/1 multiplications. This defines right.

Nothing here is shared with the compiler but the table of names and the masks: weights come through transformers, and
attention, caches and activations are those of transformers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dispc.families import Family
from dispc.masks import Indices, Masks, NormScope


def load_reference(directory: Path, family: Family, masks: Masks | None, dtype: torch.dtype = torch.float32) -> Any:
    """The model of `directory` in `dtype`, masked (dense with None), ready to call like any transformers model."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # transformers 5 would draw one into the command's own output
    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, trust_remote_code=False).eval()
    if masks is not None:
        apply_masks(model, family, masks)
    return model


def apply_masks(model: nn.Module, family: Family, masks: Masks) -> None:
    """Make `model` compute the masked function, in place.

    Per sub-layer, with x the residual stream and 0/1 vectors read, mid, write::

        norm_scope full      h = norm(x) * read
        norm_scope selected  h = norm over the read positions of x only
        x + write * out(mid * inner(h))

    A sub-layer with an empty set adds nothing: its write vector is zero, biases included.
    """
    for index, sets in enumerate(masks.blocks):
        block = model.get_submodule(family.block(index))
        norms = {name: block.get_submodule(name) for name in (family.attention_norm, family.mlp_norm)}
        normalise = {name: norm.forward for name, norm in norms.items()}
        for norm in norms.values():
            norm.forward = lambda x: x  # every reader normalises for itself, since read sets differ
        for norm_name, reads, out, part in (
            (family.attention_norm, family.attention_reads, family.attention_out, sets.attention),
            (family.mlp_norm, family.mlp_reads, family.down, sets.mlp),
        ):
            read, write = _vector(part.read, masks.hidden_size), _vector(part.write, masks.hidden_size)
            read_norm = _read_norm(norms[norm_name], normalise[norm_name], read, masks.norm_scope)
            for name in reads:
                block.get_submodule(name).register_forward_pre_hook(lambda m, x, f=read_norm: (f(x[0]),))
            writer = block.get_submodule(out)
            if part.mid is not None:
                mid = _vector(part.mid, masks.intermediate_size)
                writer.register_forward_pre_hook(lambda m, x, mid=mid: (x[0] * mid.to(x[0]),))
            kept = write * part.alive
            writer.register_forward_hook(lambda m, x, y, kept=kept: y * kept.to(y))


def _vector(indices: Indices, width: int) -> Tensor:
    vector = torch.zeros(width)
    vector[torch.from_numpy(indices)] = 1.0
    return vector


def _read_norm(
    norm: Any, forward: Callable[[Tensor], Tensor], read: Tensor, norm_scope: NormScope
) -> Callable[[Tensor], Tensor]:
    """What a sub-layer's projections see of the residual stream x [..., d]."""
    if norm_scope == "full":
        return lambda x: forward(x) * read.to(x)

    def selected(x: Tensor) -> Tensor:
        kept = read.to(x.device, torch.float32)
        count = kept.sum().clamp(min=1)
        h: Tensor = x.float() * kept
        if isinstance(norm, nn.LayerNorm):
            h = (h - h.sum(-1, keepdim=True) / count) * kept
        epsilon = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
        h = h * torch.rsqrt(h.square().sum(-1, keepdim=True) / count + epsilon)
        h = h.to(x.dtype) * norm.weight
        if isinstance(norm, nn.LayerNorm):
            h = h + norm.bias
        masked: Tensor = h * read.to(x)
        return masked

    return selected
