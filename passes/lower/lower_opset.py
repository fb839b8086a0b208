"""The lowest opset that the graph needs, chosen when nothing is left to rewrite."""

import onnx_ir as ir

from dispc.passes.base import RewritePass
from dispc.passes.common.versions import RELEASES, lowest_opset
from dispc.support.graph import MICROSOFT, SIMPLIFIED_NORM, make_node, replace_node

SPELLINGS = {
    "RMSNormalization": ("", SIMPLIFIED_NORM, (0, 1)),
    "RotaryEmbedding": (MICROSOFT, "RotaryEmbedding", (0, 3, 1, 2)),
}
"""Operator of opset 23 -> the domain and name under which ONNX Runtime has had it longer, and its inputs' order."""


class LowerOpsetPass(RewritePass):
    """Operators of opset 23 that ONNX Runtime has had longer take their older name, and the opset falls.

    Before (opset 23)::

        x, weight -> RMSNormalization -> normed
        x, cos, sin, position_ids -> RotaryEmbedding -> rotated

    After (opset 21, unless another operator needs more)::

        x, weight -> SimplifiedLayerNormalization -> normed
        x, position_ids, cos, sin -> com.microsoft.RotaryEmbedding -> rotated

    1. Not with `respell` off: with standard operators only, and where the standard Attention needs opset 23 anyway.
       Nor with `rotations` off (on CUDA) as long as one is left, which needs opset 23 under its standard name: ONNX
       Runtime fuses its own RotaryEmbedding into any GroupQueryAttention, also where that cannot rotate so few
       dimensions, or loses its attention bias.
    2. The opset and the IR version are set in either case.
    3. SimplifiedLayerNormalization lies in ONNX's own domain, although ONNX has no such operator:
       `support.onnx_checker` gives onnx.checker a schema of it.
    """

    name = "lower-opset"
    option_names = ("respell", "rotations")

    def __init__(self, *, respell: bool, rotations: bool = True) -> None:
        super().__init__()
        self.respell = respell
        self.rotations = rotations

    def expected(self, model: ir.Model) -> int:
        """Every norm and rotation that is left."""
        return len(self._found(model.graph))

    def _found(self, graph: ir.Graph) -> list[ir.Node]:
        found = [node for node in graph if node.domain == "" and node.op_type in SPELLINGS]
        rotates = any(node.op_type == "RotaryEmbedding" for node in found)
        return found if self.respell and (self.rotations or not rotates) else []

    def rewrite(self, model: ir.Model) -> int:
        graph, found = model.graph, self._found(model.graph)
        for node in found:
            domain, op_type, order = SPELLINGS[node.op_type]
            name = (node.name or "").replace(node.op_type, op_type)
            inputs = [node.inputs[position] for position in order]
            made = make_node(op_type, inputs, name, domain=domain, attributes=dict(node.attributes))
            replace_node(graph, node, made)
            if domain:
                graph.opset_imports[domain] = 1
        graph.opset_imports[""] = lowest_opset(graph)
        model.ir_version = RELEASES[graph.opset_imports[""]].ir_version
        return len(found)
