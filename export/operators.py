"""The operators that a decoder consists of, and what each becomes in ONNX: one row for each.

Once attention, rotary embedding and norms are operators of ours, about twenty ATen operators are left.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from dispc.export.builder import Emitted, GraphBuilder, Node
from dispc.support.errors import CompileError
from dispc.support.graph import WINDOW

Handler = Callable[[GraphBuilder, Node], Emitted]
"""Emits the nodes for an FX node, and returns their value or values."""
LAST = torch.iinfo(torch.int64).max
RESHAPES = ("aten.view.default", "aten.reshape.default")


def _alias(t: GraphBuilder, node: Node) -> Emitted:
    return t.same(node, node.args[0])


def _unary(op_type: str) -> Handler:
    return lambda t, node: t.emit(node, op_type, [t.values[node.args[0]]])


def _binary(op_type: str) -> Handler:
    return lambda t, node: t.emit(node, op_type, [t.operand(node, argument) for argument in node.args[:2]])


def _scaled(op_type: str) -> Handler:
    """Multiplication or division; nothing at all by the number 1."""

    def emit(t: GraphBuilder, node: Node) -> Emitted:
        return _alias(t, node) if node.args[1] == 1 else _binary(op_type)(t, node)

    return emit


def _silu(t: GraphBuilder, node: Node) -> Emitted:
    x = t.values[node.args[0]]
    return t.emit(node, "Mul", [x, t.emit(node, "Sigmoid", [x])])


def _gelu(t: GraphBuilder, node: Node) -> Emitted:
    return t.emit(node, "Gelu", [t.values[node.args[0]]], approximate=node.kwargs.get("approximate", "none"))


def _linear(t: GraphBuilder, node: Node) -> Emitted:
    x, weight, *bias = node.args
    y = t.emit(node, "MatMul", [t.values[x], t.parameter(weight, transpose=True)])
    return t.emit(node, "Add", [y, t.parameter(bias[0])]) if bias and bias[0] is not None else y


def _norm(t: GraphBuilder, node: Node) -> Emitted:
    x, weight, bias, epsilon, layer, offset = node.args
    inputs = [t.values[x], t.parameter(weight, offset=offset)] + ([] if bias is None else [t.parameter(bias)])
    op_type = "LayerNormalization" if layer else "RMSNormalization"
    return t.emit(node, op_type, inputs, axis=-1, epsilon=epsilon)


def _embedding(t: GraphBuilder, node: Node) -> Emitted:
    weight, indices = node.args[:2]
    return t.emit(node, "Gather", [t.parameter(weight), t.values[indices]], axis=0)


def _to(t: GraphBuilder, node: Node) -> Emitted:
    source, target = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    if source == target:
        return _alias(t, node)
    return t.emit(node, "Cast", [t.values[node.args[0]]], to=from_torch_dtype(target))


def _transpose(t: GraphBuilder, node: Node) -> Emitted:
    x, first, second = node.args
    x = t.origin(x)
    if str(x.target) == "aten.transpose.int" and {*x.args[1:]} == {first, second}:
        return t.same(node, x.args[0])
    order = list(range(len(node.meta["val"].shape)))
    order[first], order[second] = order[second], order[first]
    return t.emit(node, "Transpose", [t.values[x]], perm=order)


def _reshape(t: GraphBuilder, node: Node) -> Emitted:
    origin = t.origin(node.args[0])
    while str(origin.target) in RESHAPES:
        origin = t.origin(origin.args[0])
    source, target = [str(s) for s in origin.meta["val"].shape], [str(s) for s in node.meta["val"].shape]
    if source == target:
        return t.same(node, origin)
    value: ir.Value = t.values[origin]
    if len(source) == len(target) + 1 and source[2:] == target[1:]:
        t.flat.add(node)
        return value
    if origin in t.flat and len(target) == 3:
        return value
    shape = [
        0 if i < len(source) and size == source[i] else int(size) if size.isdigit() else -1
        for i, size in enumerate(target)
    ]
    if shape.count(-1) > 1:
        raise CompileError(f"{t.module(node)}: reshape {source} to {target} is not known to the trace")
    return t.emit(node, "Reshape", [value, t.constant(f"shape.{'_'.join(map(str, shape))}", shape)])


def _slice(t: GraphBuilder, node: Node) -> Emitted:
    x, axis, start, end = (*node.args, 0, 0, LAST)[:4] if len(node.args) < 4 else node.args[:4]
    if start in (0, None) and end in (LAST, None):
        return t.same(node, x)
    return t.emit(node, "Slice", [t.values[x], *(t.constant(f"axes.{v}", [v]) for v in (start, end, axis))])


def _concat(t: GraphBuilder, node: Node) -> Emitted:
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


def _rotary(t: GraphBuilder, node: Node) -> Emitted:
    x, heads, number = node.args
    tables, suffix = t.rotary_tables[number], f"_{number}" if number else ""
    cos, sin = (t.tensor(f"{name}_cache{suffix}", table) for name, table in (("cos", tables.cos), ("sin", tables.sin)))
    width = 2 * tables.cos.shape[1]
    partial = {"rotary_embedding_dim": width} if width != t.checkpoint.config.head_dim else {}
    interleaved = {"interleaved": 1} if tables.interleaved else {}
    inputs = [t.values[x], cos, sin, t.position_ids]
    return t.emit(node, "RotaryEmbedding", inputs, num_heads=heads, **partial, **interleaved)


def _attention(t: GraphBuilder, node: Node) -> Emitted:
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
    outputs = t.emit_all(node, "Attention", inputs, 3, scale=scale, **heads, **capped)
    t.graph[-1].metadata_props[WINDOW] = str(window)  # the operator has no attribute for it, the mask has it
    return outputs


@dataclass(frozen=True)
class Spelling:
    """How an operator of torch is spelled in ONNX.

    handle: see `Handler`.
    reads: the arguments that it uses, by the names of torch's schema.
    ignores: arguments that change nothing here: no gradients, no training, and results are read off the trace.
    neutral: the values of further arguments that change nothing, where that is not their default.
    position_wise: it treats every position alike, so that it reads [B*S,d] and [B,S,d] the same way.
    """

    handle: Handler
    reads: str
    ignores: str = ""
    neutral: Mapping[str, object] = field(default_factory=dict)
    position_wise: bool = False

    def refuse_unread(self, node: Node, module: str) -> None:
        """Raise CompileError for an argument that would change the result and that `handle` does not read."""
        arguments = node.target._schema.arguments
        given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
        for argument in arguments:
            name, usual = argument.name, self.neutral.get(argument.name, argument.default_value)
            if name in given and name not in f"{self.reads} {self.ignores}".split() and given[name] != usual:
                what = f"{node.target} with {name}={given[name]}"
                raise CompileError(f"{module}: {what} in the model's code is not known to the trace")


SAME = "size dtype layout device pin_memory non_blocking copy memory_format"
"""Arguments whose effect is read off the traced shapes and dtypes."""

SPELLINGS: dict[str, Spelling] = {
    "aten.linear.default": Spelling(_linear, "input weight bias", position_wise=True),
    "aten.embedding.default": Spelling(_embedding, "weight indices", "padding_idx scale_grad_by_freq sparse"),
    "dispc.norm.default": Spelling(_norm, "x weight bias epsilon layer offset", position_wise=True),
    "dispc.rotary.default": Spelling(_rotary, "x heads table"),
    "dispc.attention.default": Spelling(_attention, "q k v past_k past_v scale window softcap"),
    "aten.add.Tensor": Spelling(_binary("Add"), "self other", position_wise=True),
    "aten.mul.Tensor": Spelling(_scaled("Mul"), "self other", position_wise=True),
    "aten.div.Tensor": Spelling(_scaled("Div"), "self other", position_wise=True),
    "aten.square.default": Spelling(
        lambda t, node: t.emit(node, "Mul", [t.values[node.args[0]]] * 2), "self", position_wise=True
    ),
    "aten.tanh.default": Spelling(_unary("Tanh"), "self", position_wise=True),
    "aten.silu.default": Spelling(_silu, "self", position_wise=True),
    "aten.gelu.default": Spelling(_gelu, "self approximate", position_wise=True),
    "aten.relu.default": Spelling(_unary("Relu"), "self", position_wise=True),
    "aten.transpose.int": Spelling(_transpose, "self dim0 dim1"),
    "aten.view.default": Spelling(_reshape, "self", SAME),
    "aten.reshape.default": Spelling(_reshape, "self", "shape"),
    "aten.slice.Tensor": Spelling(_slice, "self dim start end"),
    "aten.cat.default": Spelling(_concat, "tensors dim"),
    "aten.dropout.default": Spelling(_alias, "input", "p", {"train": False}, position_wise=True),
    "aten.contiguous.default": Spelling(_alias, "self", SAME),
    "aten.lift_fresh_copy.default": Spelling(_alias, "self"),
    "aten.detach_.default": Spelling(_alias, "self"),
    "aten.to.dtype": Spelling(_to, "self", SAME, position_wise=True),
    "aten.to.device": Spelling(_to, "self", SAME, position_wise=True),
    "aten.to.dtype_layout": Spelling(_to, "self", SAME, position_wise=True),
}
"""FX operator -> its spelling."""
