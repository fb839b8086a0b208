"""The dtypes of weights and artifacts: one row each, with its name in every library that has one of its own.

A dtype goes by its `name` everywhere else. Rows import torch and onnx_ir only when asked for theirs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch


@dataclass(frozen=True)
class Dtype:
    """One row.

    name: what torch and numpy (with ml_dtypes) call it.
    safetensors: in the header of a safetensors file.
    ort: how ONNX Runtime spells the type of such a tensor.
    artifacts: artifacts can be of this dtype; others are read from checkpoints only.
    """

    name: str
    safetensors: str
    ort: str
    artifacts: bool = True

    @property
    def torch(self) -> "torch.dtype":
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype

    @property
    def onnx(self) -> "ir.DataType":
        import onnx_ir as ir

        return ir.tensor_adapters.from_torch_dtype(self.torch)


ROWS = (
    Dtype("float32", "F32", "tensor(float)"),
    Dtype("float16", "F16", "tensor(float16)"),
    Dtype("bfloat16", "BF16", "tensor(bfloat16)"),
    Dtype("float64", "F64", "tensor(double)", artifacts=False),
)
DTYPES: dict[str, Dtype] = {row.name: row for row in ROWS}
BY_SAFETENSORS: dict[str, Dtype] = {row.safetensors: row for row in ROWS}
BY_ORT: dict[str, Dtype] = {row.ort: row for row in ROWS}
ARTIFACT_DTYPES: tuple[str, ...] = tuple(row.name for row in ROWS if row.artifacts)


def name_of(dtype: "torch.dtype") -> str:
    """What torch calls a dtype: `float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")
