"""Spell attention as the GroupQueryAttention of ONNX Runtime, for right or for left padding."""

from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dispc.masks import Masks
from dispc.model.config import DecoderConfig
from dispc.passes.base import ConditionError, RewritePass
from dispc.support.graph import MICROSOFT, WINDOW, add_initializer, make_node

Padding = Literal["left", "right"]


class LowerAttentionPass(RewritePass):
    """Attention (opset 23) becomes com.microsoft.GroupQueryAttention.

    Before::

        query, key, value, mask [B,1,S,T], past -> Attention -> output, present

    After, `padding="right"`::

        attention_mask -> ReduceSum - 1 -> seqlens_k [B]         (a row's last valid position)
        attention_mask -> Shape[1]      -> total_sequence_length
        query, key, value, past, seqlens_k, total_sequence_length -> GroupQueryAttention -> output, present

    and `padding="left"`, where every row ends at the last position and the mask becomes a bias::

        ReduceSum(1) - 1 -> seqlens_k [B];   mask -> Where(., 0, lowest) -> attention_bias [B,1,S,T]

    1. GroupQueryAttention is always causal. With right padding it also applies the sliding window by attribute;
       with left padding the mask already holds it.
    """

    name = "lower-attention"
    option_names = ("padding",)

    def __init__(self, padding: Padding, config: DecoderConfig, masks: Masks) -> None:
        super().__init__()
        self.padding = padding
        self.head_dim = config.head_dim
        self.masks = masks

    def requires(self, model: ir.Model) -> None:
        if self.head_dim % 8:
            raise ConditionError(
                f"GroupQueryAttention needs a head size that is a multiple of 8, this model's is {self.head_dim}; "
                "use --target onnx"
            )

    def expected(self, model: ir.Model) -> int:
        """Every attention that is left."""
        return self.masks.cache_layers

    def rewrite(self, model: ir.Model) -> int:
        graph = model.graph
        kernels = [node for node in graph if node.op_type == "Attention"]
        if not kernels:
            return 0
        lengths = self._lengths(graph, kernels[0])
        biases: dict[ir.Value, ir.Value] = {}
        for kernel in kernels:
            query, key, value, mask, past_key, past_value = kernel.inputs
            inputs = [query, key, value, past_key, past_value, *lengths]
            attributes = {
                "num_heads": kernel.attributes["q_num_heads"].as_int(),
                "kv_num_heads": kernel.attributes["kv_num_heads"].as_int(),
                "scale": kernel.attributes["scale"].as_float(),
            }
            if "softcap" in kernel.attributes:
                attributes["softcap"] = kernel.attributes["softcap"].as_float()
            window = int(kernel.metadata_props[WINDOW])
            if self.padding == "left":
                assert mask is not None
                if mask not in biases:
                    biases[mask] = self._bias(graph, kernel, mask)
                inputs += [None, None, None, biases[mask]]
            elif window:
                attributes["local_window_size"] = window
            name = (kernel.name or "").removesuffix("Attention") + "GroupQueryAttention"
            made = make_node(
                "GroupQueryAttention",
                inputs,
                name,
                domain=MICROSOFT,
                attributes=attributes,
                outputs=len(kernel.outputs),
            )
            graph.insert_before(kernel, made)
            for index, (old, new) in enumerate(zip(kernel.outputs, made.outputs, strict=True)):
                new.type, new.shape = old.type, old.shape
                ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
                if index:  # a graph output keeps its name
                    new.name = old.name
            graph.remove(kernel, safe=True)
        graph.opset_imports[MICROSOFT] = 1
        RemoveUnusedNodesPass()(model)
        return len(kernels)

    def _lengths(self, graph: ir.Graph, anchor: ir.Node) -> tuple[ir.Value, ir.Value]:
        """seqlens_k int32 [B], and total_sequence_length int32 [1]."""
        attention_mask = next(value for value in graph.inputs if value.name == "attention_mask")
        one = add_initializer(graph, "int.1", np.array(1, dtype=np.int64))

        def op(op_type: str, inputs: list[ir.Value | None], suffix: str = "", **attributes: object) -> ir.Value:
            node = make_node(op_type, inputs, f"/lengths/{op_type}{suffix}", attributes=attributes)
            graph.insert_before(anchor, node)
            return node.outputs[0]

        total = op("Shape", [attention_mask], start=1, end=2)
        counted = attention_mask
        if (
            self.padding == "left"
        ):  # every position counts; made of the mask itself, so that nothing is copied from the CPU
            counted = op("Cast", [op("Equal", [attention_mask, attention_mask])], "_ones", to=ir.DataType.INT64)
        axes = add_initializer(graph, "axes.1", np.array([1], dtype=np.int64))
        last = op("Sub", [op("ReduceSum", [counted, axes], keepdims=0), one])
        int32 = ir.DataType.INT32
        return op("Cast", [last], "_last", to=int32), op("Cast", [total], "_total", to=int32)

    def _bias(self, graph: ir.Graph, anchor: ir.Node, mask: ir.Value) -> ir.Value:
        """0 where `mask` allows, the lowest finite number where it does not, in the model's dtype."""
        query = anchor.inputs[0]
        past = anchor.inputs[4]
        assert query is not None and past is not None and past.dtype is not None
        dtype = past.dtype.numpy()
        lowest = np.array(ml_dtypes.finfo(dtype).min, dtype=dtype)  # type: ignore[no-untyped-call]
        allowed = add_initializer(graph, "bias.allowed", np.array(0, dtype=dtype))
        forbidden = add_initializer(graph, "bias.forbidden", lowest)
        name = (mask.name or "").removesuffix("/And_output") + "/Where"
        node = make_node("Where", [mask, allowed, forbidden], name)
        graph.insert_before(anchor, node)
        return node.outputs[0]
