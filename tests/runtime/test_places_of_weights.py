"""Wherever a model names a file of weights, the one rule for paths holds: beside it, links followed, nowhere else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from command import assert_refused
from desk import Desk
from google.protobuf.descriptor import Descriptor  # type: ignore[import-untyped]
from onnx import helper, numpy_helper

from dispc.runtime.edits import load_graph, serialise
from dispc.runtime.ort import ort
from dispc.support.graph import TENSOR_FIELDS, read_model, weight_files

Add = Callable[[onnx.ModelProto, onnx.TensorProto], None]
FLOATS = np.arange(4, dtype=np.float32)


def stored_in(location: str, name: str = "far", kind: int = onnx.TensorProto.FLOAT) -> onnx.TensorProto:
    """A tensor [4] whose values are in a file."""
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def constant(tensor: onnx.TensorProto, output: str = "far_output") -> onnx.NodeProto:
    return helper.make_node("Constant", [], [output], name=output, value=tensor)


def in_sparse_initializer(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    indices = numpy_helper.from_array(np.arange(4, dtype=np.int64), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [8]))


def in_sparse_constant(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    indices = numpy_helper.from_array(np.arange(4, dtype=np.int64), "indices")
    sparse = helper.make_sparse_tensor(tensor, indices, [8])
    model.graph.node.append(helper.make_node("Constant", [], ["far_output"], sparse_value=sparse))


def branch(tensor: onnx.TensorProto) -> onnx.GraphProto:
    output = helper.make_tensor_value_info("far_output", tensor.data_type, [4])
    return helper.make_graph([constant(tensor)], "branch", [], [output])


def in_branch(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    branches = dict(then_branch=branch(tensor), else_branch=branch(tensor))
    model.graph.node.append(helper.make_node("If", ["yes"], ["chosen"], name="chosen", **branches))


def in_function(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    opsets = [helper.make_opsetid("", 21)]
    model.functions.append(helper.make_function("own", "Far", [], ["far_output"], [constant(tensor)], opsets))


def in_training(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.training_info.add().algorithm.initializer.append(tensor)


def in_attribute_of_any_node(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("spare", [tensor]))


PLACES: dict[str, Add] = {
    "initializer": lambda model, tensor: model.graph.initializer.append(tensor),
    "sparse initializer": in_sparse_initializer,
    "constant": lambda model, tensor: model.graph.node.append(constant(tensor)),
    "sparse constant": in_sparse_constant,
    "branch": in_branch,
    "function": in_function,
    "training": in_training,
    "attribute": in_attribute_of_any_node,
}


@pytest.mark.parametrize("name", ["validate", "generate", "eval"])
@pytest.mark.parametrize("place", PLACES)
def test_weights_elsewhere_are_refused_wherever_the_model_names_them(place: str, name: str, desk: Desk) -> None:
    (desk.place / "secret").write_bytes(FLOATS.tobytes())
    path = desk.older / "model.onnx"
    model = read_model(path)
    PLACES[place](model, stored_in("../secret"))
    path.write_bytes(model.SerializeToString())
    (desk.place / "text.txt").write_text("the sea")
    words = {
        "validate": ("-r", desk.model),
        "generate": ("hello",),
        "eval": ("--data", desk.place / "text.txt"),
    }[name]
    assert_refused(desk.place, name, desk.older, *words, says=("'../secret'", "outside of its directory"))


@pytest.mark.parametrize("place", ["constant", "branch"])
def test_links_are_followed_where_they_lie(place: str, tmp_path: Path) -> None:
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    (blobs / "1").write_bytes(FLOATS.tobytes())
    (folder / "far.data").symlink_to("../blobs/1")
    output = "chosen" if place == "branch" else "far_output"
    result = helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, [4])
    model = helper.make_model(
        helper.make_graph([], "graph", [], [result]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    PLACES[place](model, stored_in("far.data"))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    edited, folders = serialise(load_graph(folder / "model.onnx"))
    assert folders == {blobs}
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(blobs))
    np.testing.assert_array_equal(ort.InferenceSession(edited, options).run(None, {})[0], FLOATS)


def test_no_kind_of_message_that_can_hold_tensors_is_forgotten() -> None:
    """The table is what ONNX's own definitions say."""
    fields: dict[str, set[str]] = {}
    pending: list[Descriptor] = [onnx.ModelProto.DESCRIPTOR]
    kinds: dict[str, Descriptor] = {}
    while pending:
        kind = pending.pop()
        if kind.name not in kinds:
            kinds[kind.name] = kind
            pending += [field.message_type for field in kind.fields if field.message_type is not None]
    holding = {"TensorProto"}
    while True:
        fields = {
            name: {f.name for f in kind.fields if f.message_type is not None and f.message_type.name in holding}
            for name, kind in kinds.items()
        }
        more = holding | {name for name, found in fields.items() if found}
        if more == holding:
            break
        holding = more
    assert {name: set(found) for name, found in TENSOR_FIELDS.items()} == {
        name: found for name, found in fields.items() if found and name != "TensorProto"
    }


def test_a_model_without_any_names_none(tmp_path: Path, desk: Desk) -> None:
    assert weight_files(read_model(desk.older / "model.onnx")) == {"model.onnx.data"}
