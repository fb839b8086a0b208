"""Spell the canonical ScatterND(add) as a gather by the inverse index and an Add."""

import numpy as np
import onnx_ir as ir

from dispc.errors import CompileError
from dispc.graph import add_initializer, consumers, drop_unused_initializers, make_node, remove_dead
from dispc.masks import Indices
from dispc.passes.base import RewritePass
from dispc.weights import LazyWeight

COLUMN_MULTIPLE = 8


class LowerScatterPass(RewritePass):
    """ScatterND(add) becomes Gather(inverse index) + Add.

    Before (w indices to write, d the width of the stream)::

        x -> MatMul [mid,w] (-> Add bias [w]) -> Transpose -> ScatterND(r^T, write [w,1], ., add) -> Transpose

    After (w' > w is a multiple of 8; columns w.. of the weight and the bias are zero)::

        x -> MatMul [mid,w'] (-> Add bias [w']) -> Gather(inverse [d], axis=-1) -> Add(r, .)

    1. inverse[write[j]] = j; every other position is w, which is a zero column: adding it changes nothing.
    2. No atomics, any dtype, one node less on the critical path, and the Add is ready to be fused with the next norm.
    """

    name = "lower-scatter"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def expected(self, model: ir.Model) -> int:
        return sum(node.op_type == "ScatterND" for node in model.graph)

    def rewrite(self, model: ir.Model) -> int:
        scatters = [node for node in model.graph if node.op_type == "ScatterND"]
        for scatter in scatters:
            self._lower(model.graph, scatter)
        drop_unused_initializers(model.graph)
        return len(scatters)

    def _lower(self, graph: ir.Graph, scatter: ir.Node) -> None:
        stream_turned, indices, update_turned = (_defined(scatter, value) for value in scatter.inputs)
        stream = _defined(scatter, _producer(scatter, stream_turned).inputs[0])
        update = _defined(scatter, _producer(scatter, update_turned).inputs[0])
        assert indices.const_value is not None
        write = indices.const_value.numpy()[:, 0]
        padded = (len(write) // COLUMN_MULTIPLE + 1) * COLUMN_MULTIPLE  # at least one column of zeros

        producer = _producer(scatter, update)
        for value in (v for node in (producer, *_bias_producer(producer)) for v in node.inputs):
            if value is not None and value.is_initializer():
                assert isinstance(value.const_value, LazyWeight)
                weight = value.const_value.pad_last(padded)
                weight.name = value.name
                value.const_value, value.shape = weight, weight.shape

        name = (scatter.name or "").removesuffix("/ScatterND")
        inverse = add_initializer(graph, f"{indices.name}.inverse", inverse_index(write, self.width))
        gather = make_node("Gather", [update, inverse], f"{name}/Gather", attributes={"axis": -1})
        add = make_node("Add", [stream, gather.outputs[0]], f"{name}/Add")
        turned_back = consumers(scatter.outputs[0])[0]
        graph.insert_before(turned_back, [gather, add])
        ir.convenience.replace_all_uses_with(turned_back.outputs[0], add.outputs[0])
        remove_dead(graph, [turned_back])


def inverse_index(write: Indices, width: int) -> Indices:
    """[width] int64: position j of `write` where write[j] is the position, len(write) (a zero column) elsewhere."""
    inverse = np.full(width, len(write), dtype=np.int64)
    inverse[write] = np.arange(len(write))
    return inverse


def _defined(scatter: ir.Node, value: ir.Value | None) -> ir.Value:
    if value is None:
        raise CompileError(f"{scatter.name}: an input is missing, so this is no canonical write")
    return value


def _producer(scatter: ir.Node, value: ir.Value) -> ir.Node:
    producer = value.producer()
    if producer is None or producer.op_type not in ("Transpose", "MatMul", "Add"):
        raise CompileError(f"{scatter.name}: {value.name} is not made as a canonical write makes it")
    return producer


def _bias_producer(node: ir.Node) -> list[ir.Node]:
    """The MatMul in front of a bias Add."""
    if node.op_type != "Add":
        return []
    producers = [value.producer() for value in node.inputs if value is not None]
    return [producer for producer in producers if producer is not None]
