"""Spell a write as a Gather by the inverse index, and an Add."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dispc.masks import Indices
from dispc.passes.common.canonical import Write, find_writes, part_writes
from dispc.passes.lower.selection import SelectionPass
from dispc.support.graph import add_initializer, make_node


class InverseGatherPass(SelectionPass[Write]):
    """ScatterND(add) becomes Gather and Add.

    Before (w indices to write, d the width of the stream r)::

        x -> MatMul [mid,w] (-> Add bias [w]) -> Transpose -> ScatterND(r^T, write [w,1], ., add) -> Transpose

    After (w' > w is a multiple of `multiple`; columns w.. of the weight and the bias are zero)::

        x -> MatMul [mid,w'] (-> Add bias [w']) -> Gather(inverse [d], axis=-1) -> Add(r, .)

    1. inverse[write[j]] = j; every other position is w, which is a zero column: adding it changes nothing.
    2. It needs no atomics and runs in every dtype, and its Add is ready to be fused with the next norm.
    """

    name = "inverse-gather"
    option_names = ("multiple",)

    def expected(self, model: ir.Model) -> int:
        return part_writes(self.masks)

    def find(self, graph: ir.Graph) -> list[Write]:
        return find_writes(graph)

    def replace(self, graph: ir.Graph, site: Write) -> None:
        padded = (len(site.indices) // self.multiple + 1) * self.multiple  # at least one column of zeros
        site.widen(lambda weight: weight.pad(-1, padded), padded)
        name = site.name.replace("/", ".").removeprefix(".")
        inverse = add_initializer(graph, f"{name}.inverse", inverse_index(site.indices, self.masks.hidden_size))
        gather = make_node("Gather", [site.update, inverse], f"{site.name}/Gather", attributes={"axis": -1})
        site.replace([gather, make_node("Add", [site.stream, gather.outputs[0]], f"{site.name}/Add")])


def inverse_index(write: Indices, width: int) -> npt.NDArray[np.int32]:
    """[width] int32: position j of `write` where write[j] is the position, len(write) (a zero column) elsewhere."""
    inverse = np.full(width, len(write), dtype=np.int32)
    inverse[write] = np.arange(len(write))
    return inverse
