"""The judge itself: planted faults are found, limits bite, and what cannot be compared is refused."""

import shutil
from pathlib import Path

import harness
import numpy as np
import onnx_ir as ir
import pytest

from dispc.compiler import CompileOptions, compile_model
from dispc.masks import Masks
from dispc.validate.parity import LIMITS, Report, check_parity, logit_error


@pytest.fixture(scope="module", params=["right", "left"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("artifact")
    checkpoint = harness.checkpoint("phi")
    Masks.random(checkpoint.config, 0.5, 4).save(directory / "masks.safetensors", checkpoint.config)
    options = CompileOptions(
        model=checkpoint.directory, masks=directory / "masks.safetensors", output=directory / "out",
        target="onnx-cpu", padding=request.param,
    )  # fmt: skip
    compile_model(options)
    return directory / "out"


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
            model.graph.insert_before(node, nodes)
            ir.convenience.replace_all_uses_with(node.outputs[0], made.outputs[0])


def initializer(model: ir.Model, name: str) -> harness.Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().copy()


def replace(model: ir.Model, name: str, values: harness.Array) -> None:
    model.graph.initializers[name].const_value = ir.tensor(values, name=name)


@pytest.mark.parametrize(
    ("fault", "checks"),
    [
        (swap_read_indices, {"prefill", "decode", "padded batch"}),
        (zero_weight_row, {"prefill", "decode", "padded batch"}),
        (shift_inverse_index, {"prefill", "decode", "padded batch"}),
        (drop_bias, {"prefill", "decode", "padded batch"}),
        (forget_padding, {"padded batch"}),
    ],
)
def test_a_planted_fault_fails_the_checks_that_can_see_it(artifact: Path, fault, checks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    broken = tmp_path / "broken"
    shutil.copytree(artifact, broken)
    model = ir.load(artifact / "model.onnx")
    fault(model)
    ir.save(model, broken / "model.onnx", external_data="model.onnx.data")
    report = check_parity(broken, harness.checkpoint("phi").directory)
    assert not report.passed
    assert {check.name for check in report.checks if not check.passed} - {"greedy tokens"} == checks


def test_the_limit_decides(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = harness.checkpoint("phi").directory
    report: Report = check_parity(artifact, model)
    assert report.passed
    worst = max(check.figure for check in report.checks)
    monkeypatch.setitem(LIMITS, "float32", worst * 0.99)
    assert not check_parity(artifact, model).passed


def test_nan_is_an_infinite_error() -> None:
    expected = np.array([0.0, 1.0])
    assert logit_error(np.array([0.0, np.nan]), expected) == float("inf")
    assert logit_error(np.array([0.0, np.inf]), expected) == float("inf")
    assert logit_error(np.array([0.5, 1.0]), expected) == 0.5
    assert logit_error(np.array([-0.5, 1.0]), expected) == 0.5
