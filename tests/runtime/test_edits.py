"""What is changed in a graph before it is judged computes what the graph as it is does."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dispc.runtime.edits import exactly_comparable
from dispc.runtime.session import FOLDED, open_session

ROWS = 3


def product(inputs: int, outputs: int, size: int, zero_points: bool, seed: int) -> onnx.ModelProto:
    """A graph of one MatMulNBits of 8 bits whose activations are rounded to int8, with random integers and scales."""
    rng, blocks = np.random.default_rng(seed), -(-inputs // size)
    stored = {
        "integers": rng.integers(0, 256, (outputs, blocks, size), dtype=np.uint8),
        "scales": rng.uniform(0.01, 1, outputs * blocks).astype(np.float32),
    }
    if zero_points:
        stored["zero_points"] = rng.integers(0, 256, outputs * blocks, dtype=np.uint8)
    attributes = {"K": inputs, "N": outputs, "bits": 8, "block_size": size, "accuracy_level": 4}
    node = helper.make_node(
        "MatMulNBits", ["x", *stored], ["logits"], "/lm_head/MatMulNBits", domain="com.microsoft", **attributes
    )
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", inputs])
    found = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None, outputs])
    constants = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    graph = helper.make_graph([node], "one product", [given], [found], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 40),
    size=st.sampled_from((16, 32)),
    zero_points=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_int8_products_are_judged_by_the_weights_that_their_integers_stand_for(
    tmp_path_factory: pytest.TempPathFactory, inputs: int, outputs: int, size: int, zero_points: bool, seed: int
) -> None:
    model = product(inputs, outputs, size, zero_points, seed)
    path = tmp_path_factory.mktemp("product") / "model.onnx"
    onnx.save(model, path)
    x = np.random.default_rng(seed).standard_normal((ROWS, inputs)).astype(np.float32)
    (exact,) = open_session(path, edit=exactly_comparable(None), config=FOLDED).run(None, {"x": x})
    attributes = model.graph.node[0].attribute
    attributes.remove(next(one for one in attributes if one.name == "accuracy_level"))
    (floating,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )
    np.testing.assert_allclose(exact, floating, rtol=1e-5, atol=1e-5 * np.abs(floating).max())
