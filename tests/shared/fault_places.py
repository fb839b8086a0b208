"""Places in a compiled graph, and what is found and replaced there, for the faults that are planted in them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
MODULES = {
    "attention": ("self_attn", "attention", "input_layernorm", "self_attn_layer_norm"),
    "mlp": (
        "mlp",
        "fc1",
        "fc2",
        "activation_fn",
        "final_layer_norm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""Modules of a block, by the sub-layer that they are of in every family."""
TURNING = "post_attention_layernorm"
"""Stands after the attention where a block has a norm after its MLP too, else before the MLP."""
PROJECTIONS = ("MatMul", "MatMulNBits")


NORMS = (
    "RMSNormalization",
    "LayerNormalization",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "SkipLayerNormalization",
)


class NotHere(Exception):
    """The graph has nothing that this kind of fault could spoil at this place."""


@dataclass(frozen=True)
class Place:
    """A sub-layer, a token index and a row of the batch; `rng` decides what else there is to decide."""

    block: int
    part: str
    token: int
    row: int
    rng: np.random.Generator

    @property
    def name(self) -> str:
        return f"block {self.block} {self.part}"


def nodes(model: ir.Model, place: Place, *op_types: str) -> list[ir.Node]:
    """The nodes of the sub-layer, of those operators where any are named."""
    inside = f"layers.{place.block}/"
    found = [node for node in model.graph if inside in (node.name or "")]
    names = {*MODULES[place.part]}
    if (place.part == "attention") == norms_after(model):
        names.add(TURNING)
    return [
        node
        for node in found
        if (node.name or "").partition(inside)[2].split("/")[0] in names and (not op_types or node.op_type in op_types)
    ]


def norms_after(model: ir.Model) -> bool:
    """Whether norms stand after the sub-layers."""
    return any("/post_feedforward_layernorm/" in (node.name or "") for node in model.graph)


def one(found: list[Any], place: Place) -> Any:
    if not found:
        raise NotHere
    return found[int(place.rng.integers(len(found)))]


def stored(node: ir.Node, position: int) -> ir.Value:
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None or value.const_value is None:
        raise NotHere
    return value


def initializers(model: ir.Model, place: Place, *op_types: str, position: int) -> list[ir.Value]:
    found = []
    for node in nodes(model, place, *op_types):
        if position < len(node.inputs) and node.inputs[position] is not None:
            value = node.inputs[position]
            if value is not None and value.const_value is not None:
                found.append(value)
    return found


def spoil(value: ir.Value, change: Callable[[Array], Array | None]) -> None:
    """Let `change` work on a copy of what is stored, and store that. A value that nothing changes is not spoiled."""
    assert value.const_value is not None
    before = value.const_value.numpy()
    after = before.copy()
    made = change(after)
    after = after if made is None else made
    if after.shape == before.shape and after.tobytes() == before.tobytes():
        raise NotHere
    value.const_value = ir.tensor(after.astype(before.dtype), name=value.name)


def producer(value: ir.Value) -> ir.Node:
    found = value.producer()
    assert found is not None
    return found


def constant(model: ir.Model, name: str, values: Any, dtype: Any = np.int64) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.asarray(values, dtype=dtype), name=name))
    model.graph.register_initializer(value)
    return value
