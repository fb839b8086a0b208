"""Faults outside of the blocks: embeddings, rotary tables, the final norm and the LM head."""

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
from fault_places import NORMS, PROJECTIONS, Array, NotHere, Place, constant, one, producer, spoil, stored
from fault_values import scale_column, shift_one


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
    """One cosine or sine of a late position is off, in the table of a single operator, under another name."""
    node, position = one(list(tables(model)), place)
    shared = stored(node, position)
    assert shared.const_value is not None
    own = constant(model, "fault.table", shared.const_value.numpy(), shared.const_value.numpy().dtype)
    node.replace_input_with(position, own)
    width = shared.const_value.shape.numpy()[1]

    def change(table: Array) -> None:
        table[place.token, int(place.rng.integers(width))] += np.asarray(0.02, table.dtype)

    spoil(own, change)
