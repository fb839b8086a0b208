"""Spell the canonical ScatterND(add) as what a target runs best."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dispc.masks import Indices
from dispc.passes.base import RewritePass
from dispc.passes.common.canonical import Write, find_writes
from dispc.support.graph import add_initializer, drop_unused_initializers, make_node


class LowerScatterPass(RewritePass):
    """ScatterND(add) becomes another way to add into a subset.

    Before (w indices to write, d the width of the stream r)::

        x -> MatMul [mid,w] (-> Add bias [w]) -> Transpose -> ScatterND(r^T, write [w,1], ., add) -> Transpose

    After, `inverse-gather` (w' > w is a multiple of `multiple`; columns w.. of the weight and the bias are zero)::

        x -> MatMul [mid,w'] (-> Add bias [w']) -> Gather(inverse [d], axis=-1) -> Add(r, .)

    and `scatter-elements` (the indices [w] are repeated for every token)::

        x -> MatMul [mid,w] (-> Add bias [w]) -> ScatterElements(r, Expand(write, Shape(.)), ., axis=-1, add)

    1. inverse[write[j]] = j; every other position is w, which is a zero column: adding it changes nothing.
    2. The inverse Gather needs no atomics and runs in every dtype, and its Add is ready to be fused with the next norm.
    """

    name = "lower-scatter"
    option_names = ("lowering", "multiple")

    def __init__(self, lowering: Literal["inverse-gather", "scatter-elements"], width: int, multiple: int = 8) -> None:
        super().__init__()
        spell: dict[str, Callable[[ir.Graph, Write], list[ir.Node]]] = {
            "inverse-gather": self._inverse_gather,
            "scatter-elements": self._scatter_elements,
        }
        self.lowering = lowering
        self.spell = spell[lowering]
        self.width = width
        self.multiple = multiple

    def expected(self, model: ir.Model) -> int:
        return sum(node.op_type == "ScatterND" for node in model.graph)

    def rewrite(self, model: ir.Model) -> int:
        writes = find_writes(model.graph)
        for write in writes:
            write.replace(self.spell(model.graph, write))
        drop_unused_initializers(model.graph)
        return len(writes)

    def _inverse_gather(self, graph: ir.Graph, write: Write) -> list[ir.Node]:
        padded = (len(write.indices) // self.multiple + 1) * self.multiple  # at least one column of zeros
        write.widen(lambda weight: weight.pad(-1, padded), padded)
        name = write.name.replace("/", ".").removeprefix(".")
        inverse = add_initializer(graph, f"{name}.inverse", inverse_index(write.indices, self.width))
        gather = make_node("Gather", [write.update, inverse], f"{write.name}/Gather", attributes={"axis": -1})
        return [gather, make_node("Add", [write.stream, gather.outputs[0]], f"{write.name}/Add")]

    def _scatter_elements(self, graph: ir.Graph, write: Write) -> list[ir.Node]:
        name = write.name.replace("/", ".").removeprefix(".")
        indices = add_initializer(graph, f"{name}.indices", write.indices)
        shape = make_node("Shape", [write.update], f"{write.name}/Shape")
        expand = make_node("Expand", [indices, shape.outputs[0]], f"{write.name}/Expand")
        inputs = [write.stream, expand.outputs[0], write.update]
        attributes = {"axis": -1, "reduction": "add"}
        return [
            shape,
            expand,
            make_node("ScatterElements", inputs, f"{write.name}/ScatterElements", attributes=attributes),
        ]


def inverse_index(write: Indices, width: int) -> npt.NDArray[np.int32]:
    """[width] int32: position j of `write` where write[j] is the position, len(write) (a zero column) elsewhere."""
    inverse = np.full(width, len(write), dtype=np.int32)
    inverse[write] = np.arange(len(write))
    return inverse
