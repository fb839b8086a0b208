"""Spell a write as ScatterElements(add)."""

import onnx_ir as ir

from dispc.passes.common.canonical import Write, find_writes, part_writes
from dispc.passes.lower.selection import SelectionPass
from dispc.support.graph import add_initializer, make_node


class ScatterElementsPass(SelectionPass[Write]):
    """ScatterND(add) becomes ScatterElements(add), which needs no Transposes but an index for every element.

    Before (w indices to write)::

        x -> MatMul [mid,w] (-> Add bias [w]) -> Transpose -> ScatterND(r^T, write [w,1], ., add) -> Transpose

    After (the indices [w] are repeated for every token)::

        x -> MatMul [mid,w] (-> Add bias [w]) -> ScatterElements(r, Expand(write, Shape(.)), ., axis=-1, add)
    """

    name = "scatter-elements"

    def expected(self, model: ir.Model) -> int:
        return part_writes(self.masks)

    def find(self, graph: ir.Graph) -> list[Write]:
        return find_writes(graph)

    def replace(self, graph: ir.Graph, site: Write) -> None:
        name = site.name.replace("/", ".").removeprefix(".")
        indices = add_initializer(graph, f"{name}.indices", site.indices)
        shape = make_node("Shape", [site.update], f"{site.name}/Shape")
        expand = make_node("Expand", [indices, shape.outputs[0]], f"{site.name}/Expand")
        inputs = [site.stream, expand.outputs[0], site.update]
        attributes = {"axis": -1, "reduction": "add"}
        scatter = make_node("ScatterElements", inputs, f"{site.name}/ScatterElements", attributes=attributes)
        site.replace([shape, expand, scatter])
