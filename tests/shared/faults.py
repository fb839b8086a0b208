"""Faults to plant into a compiled graph: what a compiler may get wrong, one at a time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import onnx_ir as ir

Fault = Callable[[ir.Model], None]


def plant(fault: Fault, artifact: Path, broken: Path) -> Path:
    """A copy of `artifact` in `broken` with the fault in it, of which its manifest tells nothing but the new size."""
    model = ir.load(artifact / "model.onnx")
    fault(model)
    shutil.copytree(artifact, broken)
    ir.save(model, broken / "model.onnx", external_data="model.onnx.data")
    manifest = json.loads((broken / "dispc.json").read_text())
    manifest["nodes"] = len(model.graph)
    manifest["bytes"] = sum(file.stat().st_size for file in broken.glob("model.onnx*"))
    (broken / "dispc.json").write_text(json.dumps(manifest))
    return broken


def swap_read_indices(model: ir.Model) -> None:
    values = initializer(model, "model.layers.1.mlp.read")
    values[[0, 1]] = values[[1, 0]]
    replace(model, "model.layers.1.mlp.read", values)


def zero_weight_row(model: ir.Model) -> None:
    values = initializer(model, "model.layers.2.self_attn.dense.weight")
    values[3] = 0
    replace(model, "model.layers.2.self_attn.dense.weight", values)


def shift_inverse_index(model: ir.Model) -> None:
    values = initializer(model, "model.layers.0.mlp.write.inverse")
    replace(model, "model.layers.0.mlp.write.inverse", np.roll(values, 1))


def drop_bias(model: ir.Model) -> None:
    replace(model, "model.layers.1.mlp.fc1.bias", 0 * initializer(model, "model.layers.1.mlp.fc1.bias"))


def read_with_the_mask_of_another_block(model: ir.Model) -> None:
    own, other = (initializer(model, f"model.layers.{block}.self_attn.read") for block in (1, 2))
    filled = np.unique(np.concatenate([other, own]))[: len(own)]
    assert (filled != own).any()
    replace(model, "model.layers.1.self_attn.read", filled)


def spoil_the_head(model: ir.Model) -> None:
    values = initializer(model, "lm_head.weight")
    values[:, 7] *= 1.01
    replace(model, "lm_head.weight", values)


def forget_padding(model: ir.Model) -> None:
    """Attend to padding, the classic of exporters: only the padded batch can notice."""
    for node in model.graph:
        if node.op_type in ("Or", "ReduceSum"):
            ones = ir.node("Max", [node.inputs[0], *node.inputs[:1]])
            if node.op_type == "Or":
                always = ir.node("Not", [ones.outputs[0]])
                made = ir.node("Or", [node.inputs[0], always.outputs[0]])
                ones = ir.node("Identity", [node.inputs[0]])
                always.replace_input_with(0, ones.outputs[0])
                nodes = [ones, always, made]
            else:
                like = ir.node("Equal", [node.inputs[0], node.inputs[0]])
                cast = ir.node("Cast", [like.outputs[0]], attributes={"to": ir.DataType.INT64})
                made = ir.node("ReduceSum", [cast.outputs[0], node.inputs[1]], attributes={"keepdims": 0})
                nodes = [like, cast, made]
            for number, each in enumerate(nodes):
                each.name = f"{node.name}/fault_{number}"
            model.graph.insert_before(node, nodes)
            ir.convenience.replace_all_uses_with(node.outputs[0], made.outputs[0])


def initializer(model: ir.Model, name: str) -> harness.Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().copy()


def replace(model: ir.Model, name: str, values: harness.Array) -> None:
    model.graph.initializers[name].const_value = ir.tensor(values, name=name)


def zero_a_scale(model: ir.Model) -> None:
    """One block of a quantised weight is nothing."""
    values = initializer(model, "model.layers.1.mlp.fc1.weight.scales")
    values.reshape(-1)[0] = 0
    replace(model, "model.layers.1.mlp.fc1.weight.scales", values)


def spoil_late_positions(model: ir.Model) -> None:
    """Cosines that are wrong from a position on that short prompts do not reach."""
    values = initializer(model, "cos_cache")
    values[140:] *= 1.01
    replace(model, "cos_cache", values)


def spoil_steps(model: ir.Model) -> None:
    """Logits that are off by a percent wherever there is a past: a prefill on an empty cache is right."""
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    length = ir.node("Shape", [past], {"start": 2, "end": 3}, name="fault/length")
    there = ir.node("Cast", [length.outputs[0]], {"to": ir.DataType.BOOL}, name="fault/there")
    share = ir.node("Cast", [there.outputs[0]], {"to": ir.DataType.FLOAT}, name="fault/share")
    percent = ir.node("Mul", [share.outputs[0], constant(model, "fault.percent", 0.01)], name="fault/percent")
    factor = ir.node("Add", [percent.outputs[0], constant(model, "fault.one", 1.0)], name="fault/factor")
    model.graph.extend([length, there, share, percent, factor])
    behind_logits(model, lambda logits: ir.node("Mul", [logits, factor.outputs[0]], name="fault/Mul"))


def behind_logits(model: ir.Model, make: Callable[[ir.Value], ir.Node]) -> None:
    """Let the output `logits` be what `make` makes of it."""
    index, logits = next((i, v) for i, v in enumerate(model.graph.outputs) if v.name == "logits")
    logits.name = "logits.right"
    node = make(logits)
    model.graph.append(node)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "logits", logits.dtype, logits.shape
    model.graph.outputs[index] = node.outputs[0]


def constant(model: ir.Model, name: str, number: float) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.array([number], dtype=np.float32), name=name))
    model.graph.register_initializer(value)
    return value
