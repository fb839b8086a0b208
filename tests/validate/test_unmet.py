"""What random prompts do not meet: rows of tables, tokens after a sliding window, other uses of the inputs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import onnx_ir as ir
import pytest
import tiny
from artifacts import artifact, failed, judged, loaded

from dispc.compiler import CompileOptions, compile_model
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.quantisation import Quantisation
from dispc.validate import check
from dispc.validate.checks.static import INTERFACE, judge_interface

TOKENS, PLACES = "model.embed_tokens.weight", "model.decoder.embed_positions.weight"
LONG = {"long prompt", "long prompt in pieces"}


def spoil_rows(name: str, rows: slice, value: float = 7.0) -> faults.Fault:
    def spoil(model: ir.Model) -> None:
        values = faults.initializer(model, name)
        values[rows] = value
        faults.replace(model, name, values)

    return spoil


@pytest.mark.parametrize(
    ("variant", "name", "rows"),
    [("llama", TOKENS, slice(101, 102)), ("opt", PLACES, slice(92, 93)), ("opt", PLACES, slice(-1, None))],
)
def test_one_wrong_row_of_a_table_is_found(variant: str, name: str, rows: slice, tmp_path: Path) -> None:
    broken = faults.plant(spoil_rows(name, rows), artifact(variant), tmp_path / "broken")
    assert "embeddings" in failed(judged(broken, variant))


@pytest.mark.parametrize(
    ("variant", "target", "options"),
    [
        ("llama", "onnx-cuda", {"dtype": "float16"}),
        ("opt", "onnx-cuda", {"dtype": "bfloat16"}),
        ("opt", "onnx", {"dtype": "float16"}),
        (
            "phi",
            "onnx-cpu",
            {"quantisation": Quantisation(bits=4, block_size=16, symmetric=False, head=False, embedding=True)},
        ),
        (
            "phi",
            "onnx-cpu",
            {"quantisation": Quantisation(bits=8, block_size=16, symmetric=True, head=True, embedding=True)},
        ),
    ],
    ids=str,
)
def test_embeddings_of_every_kind_are_compared(variant: str, target: str, options: dict[str, Any]) -> None:
    report = judged(artifact(variant, target, **options), variant, device="cpu")
    found = next(check for check in report.checks if check.name == "embeddings")
    assert found.status == "passed" and "131 tokens" in found.detail


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A model whose window of so many tokens is longer than what other scenarios feed."""
    folder = tmp_path_factory.mktemp("windowed")

    def make(window: int) -> Path:
        model = folder / str(window)
        if not model.exists():
            tiny.make_model("mistral-window", model)
            config = json.loads((model / "config.json").read_text()) | {"sliding_window": window}
            (model / "config.json").write_text(json.dumps(config))
            checked = Checkpoint(model).config
            Masks.random(checked, 0.5, 4).save(model / "masks.safetensors", checked)
        return model

    return make


@pytest.mark.parametrize(
    "options", [{"target": "onnx"}, {"target": "onnx-cpu"}, {"target": "onnx-cpu", "padding": "left"}], ids=str
)
def test_a_window_of_another_length_is_found(
    windowed: Callable[[int], Path], options: dict[str, str], tmp_path: Path
) -> None:
    for window in (80, 100):
        made = CompileOptions(model=windowed(window), output=tmp_path / str(window), validate=False, **options)  # type: ignore[arg-type]
        compile_model(made)
    assert check(tmp_path / "80", windowed(80)).passed
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(tmp_path / "100" / name, tmp_path / "80" / name)
    report = check(tmp_path / "80", windowed(80))
    assert (
        LONG | {"graph"} <= failed(report) <= LONG | {"graph", "weights", "dispc.json", "KL divergence", "top-1 tokens"}
    )


def test_a_window_that_nothing_slides_out_of_is_skipped(windowed: Callable[[int], Path], tmp_path: Path) -> None:
    made = CompileOptions(model=windowed(160), output=tmp_path / "out", target="onnx-cpu", validate=False)
    compile_model(made)
    found = next(each for each in check(tmp_path / "out", windowed(160)).checks if each.name == "long prompt")
    assert found.status == "passed" and "nothing slides out" in found.detail


def add_an_output(model: ir.Model) -> None:
    node = ir.node("Identity", [model.graph.inputs[0]], name="fault/Identity")
    leaked = node.outputs[0]
    leaked.name, leaked.dtype, leaked.shape = "leaked", ir.DataType.INT64, ir.Shape(["batch", "sequence"])
    model.graph.append(node)
    model.graph.outputs.append(leaked)


def add_an_input(model: ir.Model) -> None:
    unread = ir.Value(
        name="token_type_ids", shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64)
    )
    model.graph.inputs.append(unread)


def spoil_where(name: str, number: int) -> faults.Fault:
    """Other logits at every token whose id, or position, is `number`: one that no scenario need feed."""

    def spoil(model: ir.Model) -> None:
        source = next(value for value in model.graph.inputs if value.name == name)
        wanted = ir.Value(name="fault.number", const_value=ir.tensor([number], name="fault.number"))
        model.graph.register_initializer(wanted)
        equal = ir.node("Equal", [source, wanted], name="fault/Equal")
        share = ir.node("Cast", [equal.outputs[0]], {"to": ir.DataType.FLOAT}, name="fault/Cast")
        last = ir.Value(name="fault.axis", const_value=ir.tensor([-1], name="fault.axis"))
        model.graph.register_initializer(last)
        column = ir.node("Unsqueeze", [share.outputs[0], last], name="fault/Unsqueeze")
        model.graph.extend([equal, share, column])
        faults.behind_logits(model, lambda logits: ir.node("Add", [logits, column.outputs[0]], name="fault/Add"))

    return spoil


@pytest.mark.parametrize(
    ("fault", "options", "says"),
    [
        (add_an_output, {}, "an output leaked"),
        (add_an_input, {}, "an input token_type_ids"),
        (spoil_where("input_ids", 130), {}, "logits depends on input_ids otherwise than"),
        (spoil_where("position_ids", 9), {"target": "onnx"}, "logits depends on position_ids otherwise than"),
    ],
)
def test_a_graph_of_another_interface_or_with_other_uses_of_it_is_found(
    fault: faults.Fault, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    broken = faults.plant(fault, artifact("llama", **options), tmp_path / "broken")
    (found,) = judge_interface(loaded(broken, "llama"))
    assert found.name == INTERFACE and found.status == "failed" and says in found.detail


INTERFACES: list[tuple[str, str, dict[str, Any]]] = [
    ("phi", "onnx-cpu", {}),
    ("opt", "onnx", {"last_logits": True}),
    ("opt", "onnx-cpu", {"last_logits": True}),
    ("llama", "onnx", {}),
    ("llama", "onnx-cuda", {"dtype": "bfloat16"}),
    ("llama", "onnx-cpu", {"padding": "left", "last_logits": True}),
    ("mistral-window", "onnx", {}),
]


@pytest.mark.parametrize(("variant", "target", "options"), INTERFACES, ids=str)
def test_interfaces_of_every_kind_pass(variant: str, target: str, options: dict[str, Any]) -> None:
    model = loaded(artifact(variant, target, **options), variant)
    assert [each.status for each in judge_interface(model)] == ["passed"]
