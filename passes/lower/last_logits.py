"""Logits of each row's last token only: what generation needs of a prefill."""

from typing import Literal

import numpy as np
import onnx_ir as ir

from dispc.passes.base import RewritePass
from dispc.support.errors import CompileError
from dispc.support.graph import LAST, add_initializer, make_node


class LastLogitsPass(RewritePass):
    """The LM head sees one position per row.

    Before (h is [B,S,d])::

        h -> norm -> LM head -> logits [B,S,V]

    After, `padding="left"`, where a row's last token is the last position::

        h -> norm -> Gather(-1, axis=1) -> LM head -> logits [B,1,V]

    and `padding="right"`, where it is the position before its padding::

        ReduceSum(attention_mask) - 1 -> Min(., S - 1) -> index [B,1,1]
        h -> norm -> GatherND(index, batch_dims=1) -> LM head -> logits [B,1,V]

    1. Min covers tokens after a cache: there S is smaller than the row's length, and either S is 1 or B is.
    2. S is counted from the ids, on their device: a Shape would be computed on the CPU and copied.
    """

    name = "last-logits"
    option_names = ("padding",)

    def __init__(self, padding: Literal["left", "right"]) -> None:
        super().__init__()
        self.padding = padding

    def expected(self, model: ir.Model) -> int:
        return 1

    def rewrite(self, model: ir.Model) -> int:
        graph = model.graph
        heads = [node for node in graph if (node.name or "").startswith("/lm_head/") and "MatMul" in node.op_type]
        if len(heads) != 1 or heads[0].inputs[0] is None:
            raise CompileError(f"pass {self.name}: expected one LM head, found {[node.name for node in heads]}")
        head, hidden = heads[0], heads[0].inputs[0]
        nodes: list[ir.Node] = []

        def op(op_type: str, inputs: list[ir.Value | None], suffix: str = "", **attributes: object) -> ir.Value:
            nodes.append(make_node(op_type, inputs, f"{LAST}{op_type}{suffix}", attributes=attributes))
            return nodes[-1].outputs[0]

        def constant(name: str, value: list[int] | int) -> ir.Value:
            return add_initializer(graph, name, np.array(value, dtype=np.int64))

        if self.padding == "left":
            last = op("Gather", [hidden, constant("last.position", [-1])], axis=1)
        else:
            ids, mask = (next(v for v in graph.inputs if v.name == n) for n in ("input_ids", "attention_mask"))
            axes, one = constant("axes.1", [1]), constant("int.1", 1)
            ones = op("Cast", [op("Equal", [ids, ids])], to=ir.DataType.INT64)
            sizes = [op("ReduceSum", [v, axes], s, keepdims=1) for v, s in ((mask, "_mask"), (ones, "_ids"))]
            index = op("Sub", [op("Min", list(sizes)), one])
            index = op("Unsqueeze", [index, constant("axes.2", [2])])
            last = op("GatherND", [hidden, index], batch_dims=1)
        graph.insert_before(head, nodes)
        head.replace_input_with(0, last)
        logits = next(value for value in graph.outputs if value.name == "logits")
        logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])  # type: ignore[index]
        return 1
