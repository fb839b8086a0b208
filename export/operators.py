"""The operators a decoder consists of, and how each is spelled in ONNX: one handler for each, in one table.

Once attention, rotary embedding and norms are operators of ours, about twenty ATen operators are left.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from dispc.export.builder import GraphBuilder, Node
from dispc.support.errors import CompileError
from dispc.support.graph import WINDOW

LAST = torch.iinfo(torch.int64).max
RESHAPES = ("aten.view.default", "aten.reshape.default")


def _alias(t: GraphBuilder, node: Node) -> Any:
    return t.same(node, node.args[0])


def _unary(op_type: str) -> Callable[[GraphBuilder, Node], Any]:
    return lambda t, node: t.emit(node, op_type, [t.values[node.args[0]]])


def _binary(op_type: str) -> Callable[[GraphBuilder, Node], Any]:
    return lambda t, node: t.emit(node, op_type, [t.operand(node, argument) for argument in node.args[:2]])


def _scaled(op_type: str) -> Callable[[GraphBuilder, Node], Any]:
    """Multiplication or division; nothing at all by the number 1."""

    def emit(t: GraphBuilder, node: Node) -> Any:
        return _alias(t, node) if node.args[1] == 1 else _binary(op_type)(t, node)

    return emit


def _silu(t: GraphBuilder, node: Node) -> Any:
    x = t.values[node.args[0]]
    return t.emit(node, "Mul", [x, t.emit(node, "Sigmoid", [x])])


def _gelu(t: GraphBuilder, node: Node) -> Any:
    return t.emit(node, "Gelu", [t.values[node.args[0]]], approximate=node.kwargs.get("approximate", "none"))


def _linear(t: GraphBuilder, node: Node) -> Any:
    x, weight, *bias = node.args
    y = t.emit(node, "MatMul", [t.values[x], t.parameter(weight, transpose=True)])
    return t.emit(node, "Add", [y, t.parameter(bias[0])]) if bias and bias[0] is not None else y


def _norm(t: GraphBuilder, node: Node) -> Any:
    x, weight, bias, epsilon, layer, offset = node.args
    inputs = [t.values[x], t.parameter(weight, offset=offset)] + ([] if bias is None else [t.parameter(bias)])
    op_type = "LayerNormalization" if layer else "RMSNormalization"
    return t.emit(node, op_type, inputs, axis=-1, epsilon=epsilon)


def _embedding(t: GraphBuilder, node: Node) -> Any:
    weight, indices = node.args[:2]
    return t.emit(node, "Gather", [t.parameter(weight), t.values[indices]], axis=0)


def _to(t: GraphBuilder, node: Node) -> Any:
    source, target = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    return (
        _alias(t, node)
        if source == target
        else t.emit(node, "Cast", [t.values[node.args[0]]], to=from_torch_dtype(target))
    )


def _transpose(t: GraphBuilder, node: Node) -> Any:
    x, first, second = node.args
    x = t.origin(x)
    if str(x.target) == "aten.transpose.int" and {*x.args[1:]} == {first, second}:
        return t.same(node, x.args[0])
    order = list(range(len(node.meta["val"].shape)))
    order[first], order[second] = order[second], order[first]
    return t.emit(node, "Transpose", [t.values[x]], perm=order)


def _reshape(t: GraphBuilder, node: Node) -> Any:
    origin = t.origin(node.args[0])
    while str(origin.target) in RESHAPES:
        origin = t.origin(origin.args[0])
    source, target = [str(s) for s in origin.meta["val"].shape], [str(s) for s in node.meta["val"].shape]
    if source == target:
        return t.same(node, origin)
    if len(source) == len(target) + 1 and source[2:] == target[1:]:
        t.flat.add(node)
        return t.values[origin]
    if origin in t.flat and len(target) == 3:
        return t.values[origin]
    shape = [
        0 if i < len(source) and size == source[i] else int(size) if size.isdigit() else -1
        for i, size in enumerate(target)
    ]
    if shape.count(-1) > 1:
        raise CompileError(f"{t.module(node)}: reshape {source} to {target} is not known to the trace")
    return t.emit(node, "Reshape", [t.values[origin], t.constant(f"shape.{'_'.join(map(str, shape))}", shape)])


def _slice(t: GraphBuilder, node: Node) -> Any:
    x, axis, start, end = (*node.args, 0, 0, LAST)[:4] if len(node.args) < 4 else node.args[:4]
    if start in (0, None) and end in (LAST, None):
        return t.same(node, x)
    return t.emit(node, "Slice", [t.values[x], *(t.constant(f"axes.{v}", [v]) for v in (start, end, axis))])


def _concat(t: GraphBuilder, node: Node) -> Any:
    parts, axis = (*node.args, 0)[:2]
    first = parts[0]
    slices = [part.args for part in parts if str(part.target) == "aten.slice.Tensor"]
    if len(slices) == len(parts):
        ends = [0, *(part[3] for part in slices)]
        starts = [part[2] for part in slices]
        same_source = all(part[0] is first.args[0] for part in slices)
        if same_source and starts == ends[:-1] and ends[-1] == LAST:  # Phi cuts out the rotary part and glues it back
            return t.same(node, first.args[0])
    return t.emit(node, "Concat", [t.values[part] for part in parts], axis=axis)


def _rotary(t: GraphBuilder, node: Node) -> Any:
    x, heads, number = node.args
    tables, suffix = t.rotary_tables[number], f"_{number}" if number else ""
    cos, sin = (t.tensor(f"{name}_cache{suffix}", table) for name, table in (("cos", tables.cos), ("sin", tables.sin)))
    width = 2 * tables.cos.shape[1]
    partial = {"rotary_embedding_dim": width} if width != t.checkpoint.config.head_dim else {}
    interleaved = {"interleaved": 1} if tables.interleaved else {}
    inputs = [t.values[x], cos, sin, t.position_ids]
    return t.emit(node, "RotaryEmbedding", inputs, num_heads=heads, **partial, **interleaved)


def _attention(t: GraphBuilder, node: Node) -> Any:
    query, key, value, past_key, past_value, scale, window, softcap = node.args
    inputs = [
        t.values[query],
        t.values[key],
        t.values[value],
        t.mask(window),
        t.values[past_key],
        t.values[past_value],
    ]
    config = t.checkpoint.config
    heads = {"q_num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads}
    capped = {"softcap": softcap} if softcap else {}
    outputs = t.emit(node, "Attention", inputs, outputs=3, scale=scale, **heads, **capped)
    outputs[0].producer().metadata_props[WINDOW] = str(window)  # the operator has no attribute for it, the mask has it
    return outputs


POSITION_WISE = ("aten.linear", "aten.add", "aten.mul", "aten.div", "aten.square", "aten.tanh", "aten.relu",
                 "aten.gelu", "aten.silu", "aten.dropout", "aten.to.", "dispc.norm")  # fmt: skip
"""Operators that treat every position alike: they read [B*S,d] and [B,S,d] the same way."""

HANDLERS: dict[str, Callable[[GraphBuilder, Node], Any]] = {
    "aten.linear.default": _linear,
    "aten.embedding.default": _embedding,
    "dispc.norm.default": _norm,
    "dispc.rotary.default": _rotary,
    "dispc.attention.default": _attention,
    "aten.add.Tensor": _binary("Add"),
    "aten.mul.Tensor": _scaled("Mul"),
    "aten.div.Tensor": _scaled("Div"),
    "aten.square.default": lambda t, node: t.emit(node, "Mul", [t.values[node.args[0]]] * 2),
    "aten.tanh.default": _unary("Tanh"),
    "aten.silu.default": _silu,
    "aten.gelu.default": _gelu,
    "aten.relu.default": _unary("Relu"),
    "aten.transpose.int": _transpose,
    "aten.view.default": _reshape,
    "aten.reshape.default": _reshape,
    "aten.slice.Tensor": _slice,
    "aten.cat.default": _concat,
    "aten.dropout.default": _alias,
    "aten.contiguous.default": _alias,
    "aten.lift_fresh_copy.default": _alias,
    "aten.detach_.default": _alias,
    "aten.to.dtype": _to,
    "aten.to.device": _to,
    "aten.to.dtype_layout": _to,
}
