"""Faults that depend on the inputs: what a sub-layer adds to the stream is wrong for some tokens, rows or calls."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from fault_places import NORMS, PROJECTIONS, NotHere, Place, constant, nodes, norms_after, producer


def update(model: ir.Model, place: Place) -> ir.Value:
    """The output of the sub-layer's last projection, with its bias, and with the norm after it, if any."""
    last = nodes(model, place, *PROJECTIONS, *(NORMS if norms_after(model) else ()))
    if not last:
        raise NotHere
    value = last[-1].outputs[0]
    adds = [use.node for use in value.uses() if use.node.op_type == "Add" and "/write/" not in (use.node.name or "")]
    return adds[0].outputs[0] if adds and any(v and v.const_value is not None for v in adds[0].inputs) else value


def after(model: ir.Model, value: ir.Value, made: list[ir.Node]) -> None:
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

        zero_, one_ = (constant(model, f"fault.{value}.{len(made)}", value) for value in (0, 1))
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
        flags = add(operator, [where, constant(model, f"fault.number.{len(made)}", number(place))])
        return add("Reshape", [flags, constant(model, f"fault.shape.{len(made)}", shape)])

    return make


def both(*conditions: Condition) -> Condition:
    """Where all of them hold."""

    def make(model: ir.Model, place: Place, made: list[ir.Node]) -> ir.Value:
        flags, *others = [condition(model, place, made) for condition in conditions]
        for other in others:
            made.append(ir.node("And", [flags, other], name=f"fault/{len(made)}"))
            flags = made[-1].outputs[0]
        return flags

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
        after(model, value, made)

    return plant
