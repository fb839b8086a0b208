"""Projections that read the same value as one wider projection."""

from collections.abc import Sequence

import onnx_ir as ir

from dispc.model.weights import ConcatWeight, weight_of
from dispc.passes.common.blocks import Projection
from dispc.support.errors import CompileError
from dispc.support.graph import READS, WRITES, add_initializer, make_node, scope


def projection_of(value: ir.Value | None) -> Projection | None:
    """The projection (a MatMul by an initializer, perhaps an Add of a bias) whose output `value` is."""
    node = value.producer() if value is not None else None
    bias = None
    if node is not None and node.op_type == "Add" and any(v is not None and v.is_initializer() for v in node.inputs):
        bias, before = node, next((v for v in node.inputs if v is not None and not v.is_initializer()), None)
        node = before.producer() if before is not None else None
    if node is None or node.op_type != "MatMul" or node.inputs[1] is None or not node.inputs[1].is_initializer():
        return None
    return Projection(node, bias)


def pack(graph: ir.Graph, projections: Sequence[Projection], module: str) -> ir.Value:
    """One projection called `module` for all of `projections`; its output holds theirs side by side, in order.

    Raises:
        CompileError: when they do not read the same value, or only some have a bias.
    """
    first = projections[0]
    if any(p.matmul.inputs[0] is not first.matmul.inputs[0] for p in projections):
        raise CompileError(f"{first.matmul.name}: the projections packed into {module} do not read the same value")
    if len({p.bias is None for p in projections}) != 1:
        raise CompileError(f"{first.matmul.name}: only some of the projections packed into {module} have a bias")
    weight = add_initializer(
        graph, f"{module}.weight", ConcatWeight([weight_of(p.matmul.inputs[1]) for p in projections])
    )
    matmul = make_node("MatMul", [first.matmul.inputs[0], weight], f"{scope(module)}/MatMul")
    matmul.metadata_props[READS] = first.matmul.metadata_props.get(READS, "")
    matmul.metadata_props[WRITES] = ", ".join(p.matmul.metadata_props.get(WRITES, "") for p in projections)
    nodes = [matmul]
    if first.bias is not None:
        biases = [next(v for v in p.bias.inputs if v is not None and v.is_initializer()) for p in projections if p.bias]
        bias = add_initializer(graph, f"{module}.bias", ConcatWeight([weight_of(value) for value in biases]))
        nodes.append(make_node("Add", [matmul.outputs[0], bias], f"{scope(module)}/Add"))
    graph.insert_before(first.matmul, nodes)
    return nodes[-1].outputs[0]
