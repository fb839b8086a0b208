"""FX to ONNX: translate the exported program of the semantic trace, operator by operator.

Reshapes and transposes that undo each other are recognised on the way, so queries, keys and values stay [B,S,H*D]; a
flattening of batch and sequence (OPT) is followed through position-wise operators and never emitted.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch._subclasses.fake_tensor import FakeTensor

from dispc.export.builder import Emitted, GraphBuilder, Node
from dispc.export.operators import RESHAPES, SPELLINGS
from dispc.export.semantic import RotaryTables
from dispc.model.checkpoint import Checkpoint
from dispc.support.errors import CompileError


def translate(
    program: torch.export.ExportedProgram,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    rotary_tables: Sequence[RotaryTables],
) -> ir.Model:
    """The ONNX model of an exported program. Parameters become lazy weights; linear weights are stored [in, out].

    Raises:
        CompileError: for an operator, or an argument of one, that has no spelling.
    """
    builder = GraphBuilder(checkpoint, dtype, rotary_tables)
    signature = program.graph_signature
    users = iter([builder.input_ids, builder.position_ids, *builder.past])
    user_inputs = set(signature.user_inputs)
    needed = _needed(program.graph)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in user_inputs:
            builder.values[node] = next(users)
        elif node not in needed or "val" not in node.meta or not _is_tensor(node.meta["val"]):
            continue
        elif node.op == "placeholder" and node.name in signature.inputs_to_parameters:
            builder.values[node] = signature.inputs_to_parameters[node.name]
        elif node.op == "placeholder":
            builder.values[node] = _constant(builder, program, node)
        else:
            builder.values[node] = _translate(builder, node)
    results = next(node for node in program.graph.nodes if node.op == "output").args[0]
    builder.finish(results)
    model = ir.Model(builder.graph, ir_version=10, producer_name="dispc")
    RemoveUnusedNodesPass()(model)
    return model


def _translate(builder: GraphBuilder, node: Node) -> Emitted:
    name = str(node.target)
    if name == "<built-in function getitem>":
        output: ir.Value = builder.values[node.args[0]][node.args[1]]
        return output
    spelling = SPELLINGS.get(name)
    module = builder.module(node)
    if spelling is None:
        raise CompileError(f"{module}: operator {name} of the model's code is not known to the trace")
    flattened = any(source in builder.flat for source in node.all_input_nodes)
    if flattened and spelling.position_wise:
        builder.flat.add(node)
    elif flattened and name not in RESHAPES:
        raise CompileError(f"{module}: operator {name} on a flattened batch is not known to the trace")
    spelling.refuse_unread(node, module)
    return spelling.handle(builder, node)


def _constant(builder: GraphBuilder, program: torch.export.ExportedProgram, node: Node) -> ir.Value:
    """A tensor that the model's code has made of its config, such as Gemma's scale of the embeddings."""
    signature = program.graph_signature
    name = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}[node.name]
    value: Any = program.constants[name]
    value = getattr(value, "constant", None) if isinstance(value, FakeTensor) else value
    if value is None:
        raise CompileError(f"{name.removeprefix('traced.')}: is no parameter, and its value is not known to the trace")
    return builder.tensor(f"constant.{name.removeprefix('traced.')}", value)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple)) and _is_tensor(value[0]))


def _needed(graph: torch.fx.Graph) -> set[Node]:
    """The nodes that the outputs depend on."""
    pending = [node for node in graph.nodes if node.op == "output"]
    needed: set[Node] = set()
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return needed
