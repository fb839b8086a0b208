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
from dispc.model.family import Family
from dispc.model.norms import Norm
from dispc.model.packed import separate


def load_reference(checkpoint: Checkpoint, masks: Masks | None, dtype: torch.dtype = torch.float32) -> Any:
    """The model of `checkpoint` in `dtype`, masked (dense with None), ready to call like any transformers model.

    In float64 its norms compute in float64 too; rotary angles are float32 in any dtype, as the model was trained.

    Raises:
        CheckpointError: when the weights cannot be loaded.
    """
    return mask_model(checkpoint.load_model(dtype), checkpoint, masks)


def mask_model(model: Any, checkpoint: Checkpoint, masks: Masks | None) -> Any:
    """A model of `checkpoint` with the masks applied, in place; parameters may be on the meta device, but the first."""
    separate(model, checkpoint.config)
    _widen_norms(model, checkpoint.family.norm)
    if masks is not None:
        mask_forward(model, checkpoint.family, masks)
    return model


def _widen_norms(model: nn.Module, norm: Norm) -> None:
    """Let norms compute in float64 where the model does; most of those of transformers always go through float32."""
    for module in model.modules():
        if norm.describes(module):
            module.forward = partial(_forward, norm, module, module.forward)


def _forward(norm: Norm, module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return normalise(norm, module, x) if x.dtype == torch.float64 else forward(x)


def normalise(norm: Norm, module: Any, x: Tensor, kept: Tensor | None = None) -> Tensor:
    """x [..., d] normalised over the positions where `kept` [d] is 1 (all with None), and zero elsewhere."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gates = torch.ones(x.shape[-1], dtype=wide, device=x.device) if kept is None else kept.to(x.device, wide)
    count = gates.sum().clamp(min=1)
    h: Tensor = x.to(wide) * gates
    if norm.kind == "layer":
        h = (h - h.sum(-1, keepdim=True) / count) * gates
    h = h * torch.rsqrt(h.square().sum(-1, keepdim=True) / count + norm.epsilon_of(module))
    h = h * (module.weight.to(wide) + norm.offset)
    if getattr(module, "bias", None) is not None:
        h = h + module.bias
    return (h * gates).to(x.dtype)


def mask_forward(model: nn.Module, family: Family, masks: Masks) -> None:
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
            (family.attention_reads, None, "attention.read"),
            ((family.attention_out,), "attention.write", None),
            (family.mlp_reads, "mlp.mid", "mlp.read"),
            ((family.down,), "mlp.write", "mlp.mid"),
        ):
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

        h = before(x) * read
        x + after(write * out(mid * inner(h)))

    `before` and `after` are norms, or nothing where the family has none there. With norm_scope full they run over all
    positions, with selected over the read and the written ones only.
    """
    for index in range(blocks):
        block = model.get_submodule(family.block(index))
        norms = {name: block.get_submodule(name) for names in family.sub_layers.values() if (name := names.before)}
        forwards = {name: norm.forward for name, norm in norms.items()}
        for norm in norms.values():
            norm.forward = lambda x: x  # every reader normalises for itself, since read sets differ
        for part, names in family.sub_layers.items():
            read, write = partial(gate, index, f"{part}.read"), partial(gate, index, f"{part}.write")
            see = _select
            if names.before and norm_scope == "full":
                see = partial(_normalise_and_select, forwards[names.before])
            elif names.before:
                see = partial(normalise, family.norm, norms[names.before])
            seen = _Read(see, read, len(names.reads))
            for name in names.reads:
                block.get_submodule(name).register_forward_pre_hook(lambda m, x, seen=seen: (seen(x[0]),))
            writer = block.get_submodule(names.write)
            if part == "mlp":
                mid = partial(gate, index, "mlp.mid")
                writer.register_forward_pre_hook(lambda m, x, mid=mid: (x[0] * mid().to(x[0]),))
            writer.register_forward_hook(lambda m, x, y, write=write: y * write().to(y))
            if names.after and norm_scope == "selected":
                after = block.get_submodule(names.after)
                after.forward = lambda y, m=after, write=write: normalise(family.norm, m, y, write())


def _select(x: Tensor, read: Tensor) -> Tensor:
    return x * read.to(x)


def _normalise_and_select(forward: Callable[[Tensor], Tensor], x: Tensor, read: Tensor) -> Tensor:
    return forward(x) * read.to(x)


def _vector(indices: Indices, width: int) -> Tensor:
    vector = torch.zeros(width)
    vector[torch.from_numpy(indices)] = 1.0
    return vector


class _Read:
    """What a sub-layer's projections see of the residual stream x [..., d].

    Its `readers` projections are called one after another with the same x: the result is computed for the first, and
    kept until the last has it (activation checkpointing runs all of them again).
    """

    def __init__(self, see: Callable[[Tensor, Tensor], Tensor], read: Callable[[], Tensor], readers: int) -> None:
        self.see, self.read, self.readers = see, read, readers
        self.waiting: list[Tensor] = []
        self.x: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.x is not x:
            self.x, self.waiting = x, [self.see(x, self.read())] * self.readers
        h = self.waiting.pop()
        if not self.waiting:
            self.x = None
        return h
