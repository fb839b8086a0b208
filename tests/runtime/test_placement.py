"""The CUDA stand-ins themselves: a small graph gets a real CUDA session and tells where its nodes run."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from placement import CPU, CUDA, place


def save_graph(path: Path, nodes: list[onnx.NodeProto], outputs: Mapping[str, int]) -> Path:
    weight = numpy_helper.from_array(np.ones((8, 8), np.float16), "weight")
    first = numpy_helper.from_array(np.array([0]), "first")
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 8])],
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs.items()],
        [weight, first],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_matmul_is_on_cuda_and_shape_arithmetic_on_the_cpu(tmp_path: Path, cuda_stub: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["same"], name="identity"),
        helper.make_node("MatMul", ["same", "weight"], ["y"], name="matmul"),
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Gather", ["shape", "first"], ["batch"], name="gather"),
        helper.make_node("Sigmoid", ["y"], ["gate"], name="sigmoid"),
        helper.make_node("Mul", ["y", "gate"], ["silu"], name="mul"),
    ]
    outputs = {"silu": TensorProto.FLOAT16, "batch": TensorProto.INT64}
    (found,) = place([save_graph(tmp_path / "m.onnx", nodes, outputs)], cuda_stub)
    assert found.assigned == {
        "matmul": ("MatMul", CUDA.name),
        "shape": ("Shape", CUDA.name),
        "gather": ("Gather", CPU.name),
        "sigmoid": ("Sigmoid", CUDA.name),
        "mul": ("Mul", CUDA.name),
    }
    assert sorted(found.optimised.values()) == ["Gather", "MatMul", "QuickGelu", "Shape"]


def test_an_operator_without_cuda_kernel_is_placed_on_the_cpu_between_copies(tmp_path: Path, cuda_stub: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["y"], name="matmul"),
        helper.make_node("Unique", ["y"], ["unique"], name="unique"),
    ]
    (found,) = place([save_graph(tmp_path / "m.onnx", nodes, {"unique": TensorProto.FLOAT16})], cuda_stub)
    assert found.assigned["unique"] == ("Unique", CPU.name)
    assert "MemcpyToHost" in found.optimised.values()


def test_a_session_without_the_cuda_provider_is_an_error(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["y"], name="matmul")]
    model = save_graph(tmp_path / "m.onnx", nodes, {"y": TensorProto.FLOAT16})
    (tmp_path / "libcublas.so.13").touch()
    with pytest.raises(RuntimeError, match="left CUDAExecutionProvider out"):
        place([model], tmp_path)
