"""Spell a write as ScatterElements(add)."""

import onnx_ir as ir

from dispc.masks import Masks
from dispc.passes.base import RewritePass
from dispc.passes.common.canonical import Write, find_writes, part_writes
from dispc.support.graph import add_initializer, drop_unused_initializers, make_node


class ScatterElementsPass(RewritePass):
    """ScatterND(add) becomes ScatterElements(add), which needs no Transposes but an index for every element.

    Before (w indices to write)::

        x -> MatMul [mid,w] (-> Add bias [w]) -> Transpose -> ScatterND(r^T, write [w,1], ., add) -> Transpose

    After (the indices [w] are repeated for every token)::

        x -> MatMul [mid,w] (-> Add bias [w]) -> ScatterElements(r, Expand(write, Shape(.)), ., axis=-1, add)
    """

    name = "scatter-elements"

    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self.masks = masks

    def expected(self, model: ir.Model) -> int:
        return part_writes(self.masks)

    def rewrite(self, model: ir.Model) -> int:
        writes = find_writes(model.graph)
        for write in writes:
            self._replace(model.graph, write)
        drop_unused_initializers(model.graph)
        return len(writes)

    def _replace(self, graph: ir.Graph, write: Write) -> None:
        name = write.name.replace("/", ".").removeprefix(".")
        indices = add_initializer(graph, f"{name}.indices", write.indices)
        shape = make_node("Shape", [write.update], f"{write.name}/Shape")
        expand = make_node("Expand", [indices, shape.outputs[0]], f"{write.name}/Expand")
        inputs = [write.stream, expand.outputs[0], write.update]
        attributes = {"axis": -1, "reduction": "add"}
        scatter = make_node("ScatterElements", inputs, f"{write.name}/ScatterElements", attributes=attributes)
        write.replace([shape, expand, scatter])
