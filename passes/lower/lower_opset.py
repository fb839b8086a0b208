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
    2. The opset and the IR version are set in either case.
    3. SimplifiedLayerNormalization lies in ONNX's own domain, although ONNX has no such operator:
       `support.onnx_checker` gives onnx.checker a schema of it.
    """

    name = "lower-opset"
    option_names = ("respell",)

    def __init__(self, *, respell: bool) -> None:
        super().__init__()
        self.respell = respell

    def expected(self, model: ir.Model) -> int:
        """Every norm and rotation that is left."""
        operators = [node.op_type for node in model.graph if node.domain == ""]
        return sum(operators.count(name) for name in SPELLINGS) if self.respell else 0

    def rewrite(self, model: ir.Model) -> int:
        graph, count = model.graph, 0
        for node in list(graph) if self.respell else []:
            if node.domain == "" and node.op_type in SPELLINGS:
                domain, op_type, order = SPELLINGS[node.op_type]
                name = (node.name or "").replace(node.op_type, op_type)
                inputs = [node.inputs[position] for position in order]
                made = make_node(op_type, inputs, name, domain=domain, attributes=dict(node.attributes))
                replace_node(graph, node, made)
                if domain:
                    graph.opset_imports[domain] = 1
                count += 1
        graph.opset_imports[""] = lowest_opset(graph)
        model.ir_version = RELEASES[graph.opset_imports[""]].ir_version
        return count
