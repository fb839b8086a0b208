"""The masked reference: the dense torch model with the sets applied as 0/1 multiplications. This defines right.

Shared with the compiler are the table of names, the masks, and the reading of config.json and tensors, which runs no
code of a checkpoint and which tests hold against transformers' own loading; all that is computed is transformers' code.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dispc.masks import Indices, Masks, NormScope, set_width
from dispc.model.checkpoint import Checkpoint
from dispc.model.families import Family


def load_reference(checkpoint: Checkpoint, masks: Masks | None, dtype: torch.dtype = torch.float32) -> Any:
    """The model of `checkpoint` in `dtype`, masked (dense with None), ready to call like any transformers model.

    In float64 its norms compute in float64 too; rotary angles are float32 in any dtype, as the model was trained.

    Raises:
        CheckpointError: when the weights cannot be loaded.
    """
    return mask_model(checkpoint.load_model(dtype), checkpoint, masks)


def mask_model(model: Any, checkpoint: Checkpoint, masks: Masks | None) -> Any:
    """A model of `checkpoint` with the masks applied, in place; parameters may be on the meta device, but the first."""
    _widen_norms(model)
    if masks is not None:
        apply_masks(model, checkpoint.family, masks)
    return model


def _widen_norms(model: nn.Module) -> None:
    """Let RMS norms compute in float64 where the model does; those of transformers always go through float32."""
    for norm in model.modules():
        if hasattr(norm, "variance_epsilon"):
            norm.forward = partial(_rms_norm, norm, norm.forward)


def _rms_norm(norm: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if x.dtype != torch.float64:
        return forward(x)
    wide: Tensor = norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))
    return wide


def apply_masks(model: nn.Module, family: Family, masks: Masks) -> None:
    """Make `model` compute the masked function, in place.

    A sub-layer with an empty set adds nothing: its write vector is zero, biases included.
    """
    vectors = _vectors(masks, next(model.parameters()).device)
    apply_gates(model, family, masks.norm_scope, len(vectors), lambda index, name: vectors[index][name])


@torch.no_grad()
def zero_outside(model: nn.Module, family: Family, masks: Masks) -> None:
    """Set to zero, in place, the projection weights and biases that the masked function does not use.

    It stays the same. With `norm_scope` full the zeros alone compute it, without masks. The bias of a projection that
    the block reads with (query, key, value) is used by every position, and stays.
    """
    for index, vectors in enumerate(_vectors(masks, next(model.parameters()).device)):
        block = model.get_submodule(family.block(index))
        for names, rows, columns in (
            (family.attention_reads, None, "attention.read"), ((family.attention_out,), "attention.write", None),
            (family.mlp_reads, "mlp.mid", "mlp.read"), ((family.down,), "mlp.write", "mlp.mid"),
        ):  # fmt: skip
            for name in names:
                layer: Any = block.get_submodule(name)
                if columns:
                    layer.weight.mul_(vectors[columns].to(layer.weight))
                if rows:
                    layer.weight.mul_(vectors[rows].to(layer.weight)[:, None])
                    if layer.bias is not None:
                        layer.bias.mul_(vectors[rows].to(layer.bias))


def _vectors(masks: Masks, device: torch.device) -> list[dict[str, Tensor]]:
    """For every block the 0/1 vector of each set; the write vector of a sub-layer that adds nothing is zero."""
    vectors = []
    for block in masks.blocks:
        sets = {
            name: _vector(indices, set_width(name, masks.hidden_size, masks.intermediate_size)).to(device)
            for name, indices in block.sets().items()
        }
        sets["attention.write"] *= block.attention.alive
        sets["mlp.write"] *= block.mlp.alive
        vectors.append(sets)
    return vectors


def apply_gates(
    model: nn.Module, family: Family, norm_scope: NormScope, blocks: int, gate: Callable[[int, str], Tensor]
) -> None:
    """Make `model` compute the gated function, in place; `gate(block, set)` is asked at each forward pass.

    Per sub-layer, with x the residual stream and gate vectors read, mid, write (0/1, or on the way there when learnt)::

        norm_scope full      h = norm(x) * read
        norm_scope selected  h = norm over the read positions of x only
        x + write * out(mid * inner(h))
    """
    for index in range(blocks):
        block = model.get_submodule(family.block(index))
        norms = {name: block.get_submodule(name) for name in (family.attention_norm, family.mlp_norm)}
        normalise = {name: norm.forward for name, norm in norms.items()}
        for norm in norms.values():
            norm.forward = lambda x: x  # every reader normalises for itself, since read sets differ
        for norm_name, reads, out, part in (
            (family.attention_norm, family.attention_reads, family.attention_out, "attention"),
            (family.mlp_norm, family.mlp_reads, family.down, "mlp"),
        ):
            read = partial(gate, index, f"{part}.read")
            read_norm = _ReadNorm(norms[norm_name], normalise[norm_name], read, norm_scope, len(reads))
            for name in reads:
                block.get_submodule(name).register_forward_pre_hook(lambda m, x, f=read_norm: (f(x[0]),))
            writer = block.get_submodule(out)
            if part == "mlp":
                mid = partial(gate, index, "mlp.mid")
                writer.register_forward_pre_hook(lambda m, x, mid=mid: (x[0] * mid().to(x[0]),))
            write = partial(gate, index, f"{part}.write")
            writer.register_forward_hook(lambda m, x, y, write=write: y * write().to(y))


def _vector(indices: Indices, width: int) -> Tensor:
    vector = torch.zeros(width)
    vector[torch.from_numpy(indices)] = 1.0
    return vector


class _ReadNorm:
    """What a sub-layer's projections see of the residual stream x [..., d].

    Its `readers` projections ask in turn with the same x: the answer is worked out for the first, and kept no longer
    than until the last has it (activation checkpointing runs all of them again).
    """

    def __init__(
        self, norm: Any, forward: Callable[[Tensor], Tensor], read: Callable[[], Tensor], scope: NormScope, readers: int
    ) -> None:
        self.norm, self.forward, self.read, self.readers = norm, forward, read, readers
        self.compute = self.full if scope == "full" else self.selected
        self.waiting: list[Tensor] = []
        self.x: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.x is not x:
            self.x, self.waiting = x, [self.compute(x)] * self.readers
        h = self.waiting.pop()
        if not self.waiting:
            self.x = None
        return h

    def full(self, x: Tensor) -> Tensor:
        return self.forward(x) * self.read().to(x)

    def selected(self, x: Tensor) -> Tensor:
        read = self.read().to(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        kept = read.to(wide)
        count = kept.sum().clamp(min=1)
        h: Tensor = x.to(wide) * kept
        if isinstance(self.norm, nn.LayerNorm):
            h = (h - h.sum(-1, keepdim=True) / count) * kept
        epsilon = self.norm.eps if isinstance(self.norm, nn.LayerNorm) else self.norm.variance_epsilon
        h = h * torch.rsqrt(h.square().sum(-1, keepdim=True) / count + epsilon)
        h = h.to(x.dtype) * self.norm.weight
        if isinstance(self.norm, nn.LayerNorm):
            h = h + self.norm.bias
        masked: Tensor = h * read
        return masked
