"""Lazy weight expressions: what a pruned weight is made of, evaluated only while the artifact is written.

    checkpoint tensor [out, in] -> select rows -> select columns -> transpose -> pad -> cast

Each method returns a new expression; nothing is read before `evaluate`. The expressions are onnx_ir tensors, so that
graphs carry them as initializers.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from dispc.checkpoint import CheckpointTensor
from dispc.errors import CheckpointError

DTYPES: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
}


class LazyWeight(ir.LazyTensor):
    """A tensor that is computed each time it is asked for, and never kept."""

    def __init__(self, source: str, shape: tuple[int, ...], dtype: torch.dtype, compute: Callable[[], torch.Tensor]):
        super().__init__(
            lambda: ir.tensor_adapters.TorchTensor(self.evaluate()), DTYPES[dtype], ir.Shape(shape), name=source
        )
        self.source = source
        self.torch_dtype = dtype
        self.compute = compute

    @staticmethod
    def from_checkpoint(tensor: CheckpointTensor, shape: tuple[int, ...]) -> "LazyWeight":
        """A reference to a stored tensor, which must have the shape that the model expects.

        Raises:
            CheckpointError: when the shapes differ.
        """
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
        return LazyWeight(tensor.name, shape, tensor.dtype, tensor.read)

    def _derive(
        self, shape: tuple[int, ...], operation: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None
    ) -> "LazyWeight":
        parent = self.compute
        return LazyWeight(self.source, shape, dtype or self.torch_dtype, lambda: operation(parent()))

    def select(self, axis: int, indices: npt.NDArray[np.int64]) -> "LazyWeight":
        """Keep `indices` along `axis`."""
        shape = list(self.shape.numpy())
        if len(indices) == shape[axis]:
            return self
        shape[axis] = len(indices)
        return self._derive(tuple(shape), lambda t: t.index_select(axis, torch.from_numpy(indices)))

    def transpose(self) -> "LazyWeight":
        """[rows, columns] -> [columns, rows]."""
        rows, columns = self.shape.numpy()
        return self._derive((columns, rows), lambda t: t.t())

    def pad_last(self, width: int) -> "LazyWeight":
        """Append zeros to the last axis until it is `width` wide."""
        shape = self.shape.numpy()
        missing = width - shape[-1]
        return self._derive((*shape[:-1], width), lambda t: torch.nn.functional.pad(t, (0, missing)))

    def cast(self, dtype: torch.dtype) -> "LazyWeight":
        """Convert to `dtype`, rounding to nearest."""
        if dtype == self.torch_dtype:
            return self
        return self._derive(tuple(self.shape.numpy()), lambda t: t.to(dtype), dtype)

    def evaluate(self) -> torch.Tensor:
        """The value, contiguous.

        Raises:
            CheckpointError: when it holds NaN or infinity, or cannot be read.
        """
        try:
            value = self.compute().contiguous()
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"tensor {self.source}: cannot be read ({str(error).splitlines()[0]})") from error
        # One pass that allocates nothing: NaN and infinity both survive a minimum or maximum.
        if value.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(value)):
            raise CheckpointError(
                f"tensor {self.source} holds NaN or infinity as {str(self.torch_dtype).removeprefix('torch.')}; "
                "if the checkpoint's values are finite, choose a wider --dtype"
            )
        return value
