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
    ort: how ONNX and ONNX Runtime spell the type of such a tensor.
    bytes: of an element.
    numpy: what holds such values in numpy without ml_dtypes: the dtype itself, or a wider one.
    artifacts: artifacts can be of this dtype; others are read from checkpoints only.
    """

    name: str
    safetensors: str
    ort: str
    bytes: int
    numpy: str
    artifacts: bool = True

    @property
    def torch(self) -> "torch.dtype":
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype

    @property
    def onnx(self) -> "ir.DataType":
        import onnx_ir as ir

        return next(dtype for dtype in ir.DataType if type_string(dtype) == self.ort)


ROWS = (
    Dtype("float32", "F32", "tensor(float)", 4, "float32"),
    Dtype("float16", "F16", "tensor(float16)", 2, "float16"),
    Dtype("bfloat16", "BF16", "tensor(bfloat16)", 2, "float32"),
    Dtype("float64", "F64", "tensor(double)", 8, "float64", artifacts=False),
)
DTYPES: dict[str, Dtype] = {row.name: row for row in ROWS}
BY_SAFETENSORS: dict[str, Dtype] = {row.safetensors: row for row in ROWS}
BY_ORT: dict[str, Dtype] = {row.ort: row for row in ROWS}
ARTIFACT_DTYPES: tuple[str, ...] = tuple(row.name for row in ROWS if row.artifacts)


def type_string(dtype: "ir.DataType") -> str:
    """How ONNX and ONNX Runtime spell the type of a tensor of these elements: `tensor(float)`."""
    return f"tensor({dtype.name.lower()})"


def name_of(dtype: "torch.dtype") -> str:
    """What torch calls a dtype: `float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")
