"""What the tests of writing fill an output directory with."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from dispc.model.storage import CheckpointTensor
from dispc.model.weights import LazyWeight


def older_artifact(path: Path) -> Path:
    path.mkdir()
    (path / "dispc.json").write_text('{"dispc": "1"}')
    (path / "model.onnx").write_bytes(b"older")
    return path


def fill(stage: Path) -> None:
    (stage / "dispc.json").write_text('{"newer": true}')
    (stage / "sub").mkdir()
    (stage / "sub" / "file").write_bytes(b"newer")


def model_of(values: dict[str, Any]) -> ir.Model:
    """A graph that adds up `values`, each a float32 array or a tensor of onnx_ir; all broadcast."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", "m"]))
    graph, total = ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="test"), x
    for name, value in values.items():
        tensor = ir.tensor(value, name=name) if isinstance(value, np.ndarray) else value
        weight = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape))
        graph.register_initializer(weight)
        node = ir.Node("", "Add", [total, weight], name=f"add.{name}")
        graph.append(node)
        total = node.outputs[0]
    total.name, total.type, total.shape = "y", x.type, ir.Shape([None, None])
    graph.outputs.append(total)
    return ir.Model(graph, ir_version=10)


def lazy(values: np.ndarray[Any, Any], name: str = "w", fail: BaseException | None = None) -> LazyWeight:
    def read() -> torch.Tensor:
        if fail:
            raise fail
        return torch.from_numpy(values)

    return LazyWeight(CheckpointTensor(name, values.shape, torch.float32, Path("shard.safetensors"), read))
