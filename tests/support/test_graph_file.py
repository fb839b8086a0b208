"""Reading a model file: texts that are not UTF-8 are refused, whichever field they are in."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from dispc.support.errors import ArtifactError
from dispc.support.graph import read_model

SPOILT = "spoilt"
PLACES: dict[str, Callable[[onnx.ModelProto], object]] = {
    "name of NodeProto": lambda model: setattr(model.graph.node[0], "name", SPOILT),
    "op_type of NodeProto": lambda model: setattr(model.graph.node[0], "op_type", SPOILT),
    "input of NodeProto": lambda model: model.graph.node[0].input.append(SPOILT),
    "doc_string of NodeProto": lambda model: setattr(model.graph.node[0], "doc_string", SPOILT),
    "name of AttributeProto": lambda model: model.graph.node[0].attribute.add(name=SPOILT, type=1, f=0.0),
    "key of StringStringEntryProto": lambda model: model.metadata_props.add(key=SPOILT, value="x"),
    "name of TensorProto": lambda model: model.graph.initializer.add(name=SPOILT, data_type=1, dims=[0]),
    "dim_param of Dimension": lambda model: setattr(
        model.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", SPOILT
    ),
    "producer_name of ModelProto": lambda model: setattr(model, "producer_name", SPOILT),
}


def whole() -> onnx.ModelProto:
    helper = onnx.helper
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in ("a", "b")]
    node = helper.make_node("Relu", ["a"], ["b"], name="node")
    return helper.make_model(helper.make_graph([node], "graph", value[:1], value[1:]))


@pytest.mark.parametrize("place", PLACES)
def test_a_text_that_is_not_utf8_is_named(place: str, tmp_path: Path) -> None:
    model, path = whole(), tmp_path / "model.onnx"
    PLACES[place](model)
    path.write_bytes(model.SerializeToString())
    assert read_model(path) == model
    path.write_bytes(model.SerializeToString().replace(SPOILT.encode(), b"sp\xffilt"))
    with pytest.raises(ArtifactError, match=f"model.onnx: not an ONNX model .*{place} is not UTF-8"):
        read_model(path)


@pytest.mark.parametrize("keys", [("location", "prepacked_0"), ("location", "offset", "offset"), ("checksum",)])
def test_weights_from_elsewhere_than_their_place_are_refused(keys: tuple[str, ...], tmp_path: Path) -> None:
    """ONNX Runtime takes weights that are packed already from keys of external data, whatever the values are."""
    model, path = whole(), tmp_path / "model.onnx"
    tensor = model.graph.initializer.add(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    for key in keys:
        tensor.external_data.add(key=key, value="0")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=f"the external data of w has {keys[-1]}"):
        read_model(path)
