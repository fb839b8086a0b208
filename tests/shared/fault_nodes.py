"""Faults in the nodes of a sub-layer: its activation, and how its attention is wired."""

import onnx_ir as ir
from fault_places import NotHere, Place, nodes, one


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
