"""Fold what a projection's output is multiplied by into its weight."""

import numpy as np
import onnx_ir as ir

from dispc.model.config import DecoderConfig
from dispc.model.family import HEAD
from dispc.model.weights import rebind, weight_of
from dispc.passes.base import RewritePass
from dispc.passes.common.packing import projection_of
from dispc.support.graph import add_initializer, make_node, remove_dead


class FoldMultipliersPass(RewritePass):
    """Constants after projections (Granite's residual and logits, Cohere's logits) go into the weights.

    Before::

        x -> MatMul(weight) (-> Add(bias)) -> Mul(c)          (or Div(1/c))

    After::

        x -> MatMul(c weight) (-> Add(c bias))

    and where the weight is the embedding's, which is stored once and not multiplied::

        x -> Mul(c) -> MatMul(weight)
    """

    name = "fold-multipliers"

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config

    def expected(self, model: ir.Model) -> int:
        """Two for each block with a residual multiplier, one for a multiplier of the logits."""
        config = self.config
        return 2 * config.num_hidden_layers * (config.residual_multiplier != 1) + (config.logits_multiplier != 1)

    def rewrite(self, model: ir.Model) -> int:
        graph, count = model.graph, 0
        for node in [node for node in graph if node.op_type in ("Mul", "Div")]:
            value, number = node.inputs
            if number is None or number.const_value is None or number.const_value.size != 1:
                continue
            projection = projection_of(value)
            if projection is None:
                continue
            matmul, weight = projection.matmul, projection.matmul.inputs[1]
            assert value is not None and weight is not None
            # The config's number: the graph's is rounded to the dtype already.
            factor = self.config.logits_multiplier if weight.name == HEAD else self.config.residual_multiplier
            if weight.name == HEAD and self.config.tied:
                dtype = number.const_value.dtype.numpy()
                scalar = add_initializer(graph, "lm_head.multiplier", np.array(factor, dtype=dtype))
                moved = make_node("Mul", [matmul.inputs[0], scalar], "/lm_head/Mul")
                graph.insert_before(matmul, moved)
                matmul.replace_input_with(0, moved.outputs[0])
            else:
                rebind(weight, weight_of(weight).multiply(factor))
                for bias in projection.bias.inputs if projection.bias else ():
                    if bias is not None and bias.is_initializer():
                        rebind(bias, weight_of(bias).multiply(factor))
            old = node.outputs[0]
            value.type, value.shape = old.type, old.shape
            if old.is_graph_output():
                value.name = old.name
            ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
            remove_dead(graph, [node])
            count += 1
        return count
