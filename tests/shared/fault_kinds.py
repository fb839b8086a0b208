"""Kinds of faults, each planted anywhere in a compiled graph: what a compiler, a converter or an edit may get wrong.

A kind takes the graph and a place in it, and finds what it needs there by module names and operators. It raises
`NotHere` where there is nothing to spoil.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
MODULES = {
    "attention": ("self_attn", "attention", "input_layernorm", "self_attn_layer_norm"),
    "mlp": (
        "mlp",
        "fc1",
        "fc2",
        "activation_fn",
        "final_layer_norm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""Modules of a block, by the sub-layer that they are of in every family."""
TURNING = "post_attention_layernorm"
"""Stands behind the attention where a block has a norm behind its MLP too, else in front of the MLP."""
INDICES = (ir.DataType.INT32, ir.DataType.INT64)
PROJECTIONS = ("MatMul", "MatMulNBits")


class NotHere(Exception):
    """The graph has nothing that this kind of fault could spoil at this place."""


@dataclass(frozen=True)
class Place:
    """A sub-layer, a token index and a row of the batch; `rng` decides what else there is to decide."""

    block: int
    part: str
    token: int
    row: int
    rng: np.random.Generator

    @property
    def name(self) -> str:
        return f"block {self.block} {self.part}"


@dataclass(frozen=True)
class Kind:
    """`plant` spoils the graph. `named` is what the drill must say (None: the sub-layer), `check` what must fail.

    `quick`: a compilation finds it too.
    """

    plant: Callable[[ir.Model, Place], None]
    named: str | None = None
    check: str | None = None
    quick: bool = True


# Finding


def nodes(model: ir.Model, place: Place, *op_types: str) -> list[ir.Node]:
    """The nodes of the sub-layer, of those operators where any are named."""
    inside = f"layers.{place.block}/"
    found = [node for node in model.graph if inside in (node.name or "")]
    names = {*MODULES[place.part]}
    if (place.part == "attention") == norms_behind(model):
        names.add(TURNING)
    return [
        node
        for node in found
        if (node.name or "").partition(inside)[2].split("/")[0] in names and (not op_types or node.op_type in op_types)
    ]


def norms_behind(model: ir.Model) -> bool:
    """Whether norms stand behind the sub-layers."""
    return any("/post_feedforward_layernorm/" in (node.name or "") for node in model.graph)


def one(found: list[Any], place: Place) -> Any:
    if not found:
        raise NotHere
    return found[int(place.rng.integers(len(found)))]


def stored(node: ir.Node, position: int) -> ir.Value:
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None or value.const_value is None:
        raise NotHere
    return value


def initializers(model: ir.Model, place: Place, *op_types: str, position: int) -> list[ir.Value]:
    found = []
    for node in nodes(model, place, *op_types):
        if position < len(node.inputs) and node.inputs[position] is not None:
            value = node.inputs[position]
            if value is not None and value.const_value is not None:
                found.append(value)
    return found


def spoil(value: ir.Value, change: Callable[[Array], Array | None]) -> None:
    """Let `change` work on a copy of what is stored, and store that. A value that nothing changes is not spoiled."""
    assert value.const_value is not None
    before = value.const_value.numpy()
    after = before.copy()
    made = change(after)
    after = after if made is None else made
    if after.shape == before.shape and after.tobytes() == before.tobytes():
        raise NotHere
    value.const_value = ir.tensor(after.astype(before.dtype), name=value.name)


# Weights, biases, norms


def weight(change: Callable[[Array, np.random.Generator], Array | None]) -> Callable[[ir.Model, Place], None]:
    """Change the float weight [K,N] of one projection."""

    def plant(model: ir.Model, place: Place) -> None:
        value = one(initializers(model, place, "MatMul", position=1), place)
        spoil(value, lambda w: change(w, place.rng))

    return plant


def heavy(w: Array, axis: int, rng: np.random.Generator) -> int:
    """A row or column that is not all zeros: padding is."""
    return int(rng.choice(np.flatnonzero(np.abs(w).max(axis=1 - axis) > 0)))


def zero_column(w: Array, rng: np.random.Generator) -> None:
    w[:, heavy(w, 1, rng)] = 0


def zero_row(w: Array, rng: np.random.Generator) -> None:
    w[heavy(w, 0, rng)] = 0


def scale_column(w: Array, rng: np.random.Generator) -> None:
    w[:, heavy(w, 1, rng)] *= np.asarray(1.01, w.dtype)


def flip_column(w: Array, rng: np.random.Generator) -> None:
    w[:, heavy(w, 1, rng)] *= -1


def swap_rows(w: Array, rng: np.random.Generator) -> None:
    i = heavy(w, 0, rng)
    j = (i + 1) % len(w)
    w[[i, j]] = w[[j, i]]


def swap_columns(w: Array, rng: np.random.Generator) -> None:
    i = heavy(w, 1, rng)
    j = (i + 1) % w.shape[1]
    w[:, [i, j]] = w[:, [j, i]]


def one_element(w: Array, rng: np.random.Generator) -> None:
    i, j = heavy(w, 0, rng), heavy(w, 1, rng)
    w[i, j] += np.asarray(0.5 * np.abs(w).max(), w.dtype)


def low_precision(w: Array, rng: np.random.Generator) -> Array:
    """As if the weight had gone through a narrower type."""
    kept = np.float32(w).view(np.uint32) & np.uint32(0xFFFF0000 if w.dtype == np.float32 else 0xFFFE0000)
    return kept.view(np.float32).astype(w.dtype)


def quantised(position: int, change: Callable[[Array, np.random.Generator], None]) -> Callable[[ir.Model, Place], None]:
    def plant(model: ir.Model, place: Place) -> None:
        spoil(one(initializers(model, place, "MatMulNBits", position=position), place), lambda w: change(w, place.rng))

    return plant


def zero_scale(scales: Array, rng: np.random.Generator) -> None:
    scales.reshape(-1)[rng.choice(np.flatnonzero(scales.reshape(-1)))] = 0


def stretch_scales(scales: Array, rng: np.random.Generator) -> None:
    scales *= np.asarray(1.02, scales.dtype)


def other_integers(packed: Array, rng: np.random.Generator) -> None:
    flat = packed.reshape(-1, packed.shape[-1])
    flat[rng.integers(len(flat))] ^= 0x77


def bias(change: Callable[[Array, np.random.Generator], None]) -> Callable[[ir.Model, Place], None]:
    def plant(model: ir.Model, place: Place) -> None:
        found = [
            value
            for node in nodes(model, place, "Add")
            for value in node.inputs
            if value is not None and value.const_value is not None and len(value.const_value.shape) == 1
        ]
        spoil(one(found, place), lambda b: change(b, place.rng))

    return plant


def zero(b: Array, rng: np.random.Generator) -> None:
    b[:] = 0


def shift_one(b: Array, rng: np.random.Generator) -> None:
    b[rng.choice(np.flatnonzero(b)) if b.any() else 0] += np.asarray(0.3, b.dtype)


NORMS = (
    "RMSNormalization",
    "LayerNormalization",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "SkipLayerNormalization",
)


def norm(model: ir.Model, place: Place, name: str) -> None:
    node = one(nodes(model, place, *NORMS), place)
    if name == "epsilon":
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.05)
        return
    skipped = node.op_type.startswith("Skip")
    position = (2 if skipped else 1) + (name == "bias")
    read = read_indices(model, place)
    value = stored(node, position)

    def change(w: Array) -> None:
        w[read[len(read) // 2]] += np.asarray(0.25, w.dtype) if len(read) else 0

    spoil(value, change)


def read_indices(model: ir.Model, place: Place) -> Array:
    gathers = [node for node in nodes(model, place, "Gather", "ArrayFeatureExtractor") if "/read/" in (node.name or "")]
    if not gathers:
        return np.arange(4)
    tensor = stored(gathers[0], 1).const_value
    assert tensor is not None
    return tensor.numpy().reshape(-1)


# Sets


def indices(part: str, change: Callable[[Array, int, np.random.Generator], None]) -> Callable[[ir.Model, Place], None]:
    """Change the index list of the read or of the write; `change` gets the width of what is indexed too."""

    def plant(model: ir.Model, place: Place) -> None:
        found = [
            value
            for node in nodes(model, place, "Gather", "ArrayFeatureExtractor", "ScatterND", "ScatterElements")
            if f"/{part}/" in (node.name or "")
            for value in node.inputs
            if value is not None and value.const_value is not None and value.dtype in INDICES
        ]
        value = one(found, place)

        def spoiled(a: Array) -> Array:
            flat = a.reshape(-1)
            change(flat, int(flat.max()) + 1, place.rng)
            return flat.reshape(a.shape)

        spoil(value, spoiled)

    return plant


def swap_indices(a: Array, width: int, rng: np.random.Generator) -> None:
    different = np.flatnonzero(a != a[0])
    if not len(different):
        raise NotHere
    other = int(rng.choice(different))
    a[[0, other]] = a[[other, 0]]


def another_index(a: Array, width: int, rng: np.random.Generator) -> None:
    """One that the list does not have; in a list that has them all, one of the others."""
    place = rng.integers(len(a))
    others = np.setdiff1d(np.arange(width), a)
    others = others if len(others) else np.setdiff1d(a, a[place])
    if not len(others):
        raise NotHere
    a[place] = rng.choice(others)


def roll_indices(a: Array, width: int, rng: np.random.Generator) -> None:
    a[:] = np.roll(a, 1)


# Activations and attention


def activation(model: ir.Model, place: Place) -> None:
    node = one(nodes(model, place, "QuickGelu", "Gelu", "Relu", "Sigmoid", "FastGelu", "BiasGelu"), place)
    if node.op_type == "QuickGelu":
        node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.1)
    elif node.op_type == "Gelu" and not node.domain:
        exact = "approximate" not in node.attributes or node.attributes["approximate"].as_string() == "none"
        node.attributes["approximate"] = ir.AttrString("approximate", "tanh" if exact else "none")
    elif node.op_type in ("Relu", "Sigmoid"):
        node.op_type = {"Relu": "Elu", "Sigmoid": "HardSigmoid"}[node.op_type]
    else:
        raise NotHere


def kernel(model: ir.Model, place: Place) -> ir.Node:
    if place.part != "attention":
        raise NotHere
    found: ir.Node = one(nodes(model, place, "GroupQueryAttention", "Attention"), place)
    return found


def attention_scale(model: ir.Model, place: Place) -> None:
    node = kernel(model, place)
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.03 * node.attributes["scale"].as_float())


def attention_window(model: ir.Model, place: Place) -> None:
    node = kernel(model, place)
    if node.op_type != "GroupQueryAttention":
        raise NotHere
    window = node.attributes["local_window_size"].as_int() if "local_window_size" in node.attributes else -1
    node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window - 1 if window > 2 else 40)


def interleaved(model: ir.Model, place: Place) -> None:
    node = kernel(model, place)
    if "do_rotary" in node.attributes:
        node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)
        return
    for rotary in nodes(model, place, "RotaryEmbedding"):
        rotary.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)
        return
    raise NotHere


def pasts(node: ir.Node) -> list[int]:
    return [n for n, v in enumerate(node.inputs) if v is not None and (v.name or "").startswith("past_key_values.")]


def swap_pasts(model: ir.Model, place: Place) -> None:
    """Keys are read as values, and values as keys."""
    node = kernel(model, place)
    first, second = pasts(node)
    key, value = node.inputs[first], node.inputs[second]
    node.replace_input_with(first, value)
    node.replace_input_with(second, key)


def past_of_another(model: ir.Model, place: Place) -> None:
    node = kernel(model, place)
    names = [v.name for v in model.graph.inputs if (v.name or "").endswith(".key")]
    position = pasts(node)[0]
    own = node.inputs[position]
    others = [v for v in model.graph.inputs if v.name in names and v is not own]
    node.replace_input_with(position, one(others, place))


def swap_presents(model: ir.Model, place: Place) -> None:
    """The cache of a step is handed to another block's next step."""
    node = kernel(model, place)
    outputs = model.graph.outputs
    own = next(n for n, v in enumerate(outputs) if v is node.outputs[1])
    other = own + 2  # the next block's: this one is the first to be wrong
    if other >= len(outputs) or not (outputs[other].name or "").startswith("present."):
        raise NotHere
    first, second = outputs[own], outputs[other]
    outputs[own], outputs[other] = second, first
    first.name, second.name = second.name, first.name


# What a sub-layer adds to the stream


def update(model: ir.Model, place: Place) -> ir.Value:
    """The output of the sub-layer's last projection, with its bias, and with the norm behind it, if any."""
    last = nodes(model, place, *PROJECTIONS, *(NORMS if norms_behind(model) else ()))
    if not last:
        raise NotHere
    value = last[-1].outputs[0]
    adds = [use.node for use in value.uses() if use.node.op_type == "Add" and "/write/" not in (use.node.name or "")]
    return adds[0].outputs[0] if adds and any(v and v.const_value is not None for v in adds[0].inputs) else value


def behind(model: ir.Model, value: ir.Value, made: list[ir.Node]) -> None:
    """Let everything that reads `value` read the output of the last node of `made` instead."""
    readers = [use for use in value.uses() if use.node not in made]
    output = made[-1].outputs[0]
    output.type, output.shape = value.type, value.shape
    if value.is_graph_output():
        index = next(n for n, v in enumerate(model.graph.outputs) if v is value)
        output.name, value.name = value.name, f"{value.name}.before"
        model.graph.outputs[index] = output
    model.graph.insert_after(producer(value), made)
    for use in readers:
        use.node.replace_input_with(use.idx, output)


def producer(value: ir.Value) -> ir.Node:
    found = value.producer()
    assert found is not None
    return found


def constant(model: ir.Model, name: str, values: Any, dtype: Any = np.int64) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.asarray(values, dtype=dtype), name=name))
    model.graph.register_initializer(value)
    return value


def size(model: ir.Model, source: str, axis: int, made: list[ir.Node]) -> ir.Value:
    """The length of an axis of a graph input, as a scalar."""
    value = next((v for v in model.graph.inputs if (v.name or "").startswith(source)), None)
    if value is None:
        raise NotHere
    shape = ir.node("Shape", [value], {"start": axis, "end": axis + 1}, name=f"fault/{len(made)}")
    squeezed = ir.node("Squeeze", [shape.outputs[0]], name=f"fault/{len(made) + 1}")
    made += [shape, squeezed]
    return squeezed.outputs[0]


Condition = Callable[[ir.Model, Place, list[ir.Node]], ir.Value]
"""Makes a boolean [batch or 1, sequence or 1, 1]."""


def compare(operator: str, axis: str, number: Callable[[Place], int]) -> Condition:
    """Where an axis stands in a relation to a number: `token` and `row` in every element, sizes for all at once."""

    def make(model: ir.Model, place: Place, made: list[ir.Node]) -> ir.Value:
        def add(op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
            made.append(ir.node(op_type, inputs, attributes, name=f"fault/{len(made)}"))
            return made[-1].outputs[0]

        zero_, one_ = constant(model, "fault.zero", 0), constant(model, "fault.one", 1)
        if axis == "token":
            total, new = size(model, "attention_mask", 1, made), size(model, "input_ids", 1, made)
            where = add("Range", [add("Sub", [total, new]), total, one_])
            shape = [1, -1, 1]
        elif axis == "row":
            where = add("Range", [zero_, size(model, "input_ids", 0, made), one_])
            shape = [-1, 1, 1]
        else:
            source, which = {"batch": ("input_ids", 0), "new": ("input_ids", 1), "past": ("past_key_values.", 2)}[axis]
            where, shape = size(model, source, which, made), [1, 1, 1]
        flags = add(operator, [where, constant(model, "fault.number", number(place))])
        return add("Reshape", [flags, constant(model, "fault.shape", shape)])

    return make


def distort(
    condition: Condition | None, factor: float = 1.05, where: Callable[[ir.Model, Place], ir.Value] = update
) -> Callable[[ir.Model, Place], None]:
    """Multiply a value by `factor` where the condition holds."""

    def plant(model: ir.Model, place: Place) -> None:
        value, made = where(model, place), list[ir.Node]()
        graph_dtype = next(v.dtype for v in model.graph.outputs if v.name == "logits")
        assert graph_dtype is not None
        like = constant(model, "fault.factor", [[[factor]]], np.float32)
        cast = ir.node("Cast", [like], {"to": graph_dtype}, name="fault/factor")
        if condition is None:
            made.append(cast)
            made.append(ir.node("Mul", [value, cast.outputs[0]], name="fault/Mul"))
        else:
            flags = condition(model, place, made)
            made.append(cast)
            scaled = ir.node("Mul", [value, cast.outputs[0]], name="fault/Mul")
            made += [scaled, ir.node("Where", [flags, scaled.outputs[0], value], name="fault/Where")]
        behind(model, value, made)

    return plant


# Outside of the blocks


def logits(model: ir.Model, place: Place) -> ir.Value:
    return next(value for value in model.graph.outputs if value.name == "logits")


def head(model: ir.Model, place: Place) -> None:
    """One column of the head is a percent off, and no row of an embedding that is stored once with it."""
    node = producer(logits(model, place))
    while node.op_type not in (*PROJECTIONS, "FusedMatMul"):
        node = producer(next(v for v in node.inputs if v is not None and v.producer() is not None))
    turned = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    for position, value in enumerate(node.inputs):
        if value is not None and value.const_value is not None and len(value.const_value.shape) == 2:
            stored_once = value.const_value.numpy()
            own = constant(model, "fault.head", stored_once, stored_once.dtype)
            node.replace_input_with(position, own)
            spoil(own, lambda w: scale_column(w.T if turned else w, place.rng))
            return
    raise NotHere


def final_norm(model: ir.Model, place: Place) -> None:
    last = [node for node in model.graph if node.op_type in NORMS and "layers." not in (node.name or "")]
    node = one(last[-1:], place)
    value = stored(node, 2 if node.op_type.startswith("Skip") else 1)
    spoil(value, lambda w: shift_one(w, place.rng))


def embedding(rows: str) -> Callable[[ir.Model, Place], None]:
    def plant(model: ir.Model, place: Place) -> None:
        found = [
            value
            for node in model.graph
            if node.op_type == "Gather" and "layers." not in (node.name or "") and rows in (node.name or "")
            for value in node.inputs[:1]
            if value is not None and value.const_value is not None and len(value.const_value.shape) == 2
        ]

        def change(table: Array) -> None:
            row = int(place.rng.integers(2, len(table)))
            table[row] += np.asarray(0.05 * np.abs(table).max(), table.dtype)

        spoil(one(found, place), change)

    return plant


def tables(model: ir.Model) -> Iterator[tuple[ir.Node, int]]:
    for node in model.graph:
        first = {"RotaryEmbedding": 1, "GroupQueryAttention": 7}.get(node.op_type)
        for position in () if first is None else (first, first + 1):
            if position < len(node.inputs) and node.inputs[position] is not None:
                yield node, position


def rotary_row(model: ir.Model, place: Place) -> None:
    """One cosine or sine far behind is off, in the table of a single operator, under another name."""
    node, position = one(list(tables(model)), place)
    shared = stored(node, position)
    assert shared.const_value is not None
    own = constant(model, "fault.table", shared.const_value.numpy(), shared.const_value.numpy().dtype)
    node.replace_input_with(position, own)
    width = shared.const_value.shape.numpy()[1]

    def change(table: Array) -> None:
        table[place.token, int(place.rng.integers(width))] += np.asarray(0.02, table.dtype)

    spoil(own, change)


HEAD = "final norm and head"
KINDS: dict[str, Kind] = {
    "weight: a column of zeros": Kind(weight(zero_column)),
    "weight: a row of zeros": Kind(weight(zero_row)),
    "weight: a column 1 % off": Kind(weight(scale_column)),
    "weight: a column negated": Kind(weight(flip_column)),
    "weight: two rows swapped": Kind(weight(swap_rows)),
    "weight: two columns swapped": Kind(weight(swap_columns)),
    "weight: one element": Kind(weight(one_element)),
    "weight: through a narrower type": Kind(weight(low_precision)),
    "quantised: a scale of zero": Kind(quantised(2, zero_scale)),
    "quantised: scales 2 % off": Kind(quantised(2, stretch_scales)),
    "quantised: other integers": Kind(quantised(1, other_integers)),
    "bias: left out": Kind(bias(zero)),
    "bias: one element": Kind(bias(shift_one)),
    "norm: one weight": Kind(lambda model, place: norm(model, place, "weight")),
    "norm: one bias": Kind(lambda model, place: norm(model, place, "bias")),
    "norm: epsilon": Kind(lambda model, place: norm(model, place, "epsilon")),
    "read: two indices swapped": Kind(indices("read", swap_indices)),
    "read: another index": Kind(indices("read", another_index)),
    "read: rolled by one": Kind(indices("read", roll_indices)),
    "write: two indices swapped": Kind(indices("write", swap_indices)),
    "write: another index": Kind(indices("write", another_index)),
    "write: rolled by one": Kind(indices("write", roll_indices)),
    "activation: another": Kind(activation),
    "attention: scale": Kind(attention_scale),
    "attention: window": Kind(attention_window),
    "attention: rotary pairs": Kind(interleaved),
    "cache: keys and values swapped": Kind(swap_pasts),
    "cache: past of another block": Kind(past_of_another),
    "cache: present of another block": Kind(swap_presents),
    "update: 1 % off": Kind(distort(None, 1.01)),
    "update: left out": Kind(distort(None, 0.0)),
    "update: from a token on": Kind(distort(compare("GreaterOrEqual", "token", lambda p: p.token)), quick=False),
    "update: at one token": Kind(distort(compare("Equal", "token", lambda p: p.token)), quick=False),
    "update: NaN from a token on": Kind(
        distort(compare("GreaterOrEqual", "token", lambda p: p.token), float("nan")), quick=False
    ),
    "update: in one row": Kind(distort(compare("Equal", "row", lambda p: p.row))),
    "update: in batches above 4": Kind(distort(compare("Greater", "batch", lambda p: 4))),
    "update: in calls of many tokens": Kind(distort(compare("Greater", "new", lambda p: p.token)), quick=False),
    "update: behind any past": Kind(distort(compare("Greater", "past", lambda p: 0))),
    "update: behind a long past": Kind(distort(compare("Greater", "past", lambda p: p.token - 8)), quick=False),
    "head: a column 1 % off": Kind(head, named=HEAD),
    "head: final norm": Kind(final_norm, named=HEAD),
    "head: from a token on": Kind(
        distort(compare("GreaterOrEqual", "token", lambda p: p.token), where=logits), named=HEAD, quick=False
    ),
    "head: in one row": Kind(distort(compare("Equal", "row", lambda p: p.row), where=logits), named=HEAD),
    "embedding: a token": Kind(embedding("embed_tokens"), named="", check="embeddings"),
    "embedding: a position": Kind(embedding("embed_positions"), named="", check="embeddings"),
    "rotary: one number of one table": Kind(rotary_row, named="", check="rotary tables"),
}
