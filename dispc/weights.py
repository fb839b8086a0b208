"""Lazy weight expressions: what a pruned weight is made of, evaluated only while the artifact is written.

    checkpoint tensor [out, in] -> cast -> transpose -> select rows -> select columns -> pad

Each method returns a new expression; nothing is read before `evaluate`. The expressions are onnx_ir tensors, so that
graphs carry them as initializers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from safetensors import SafetensorError

from dispc.checkpoint import CheckpointTensor
from dispc.errors import CheckpointError

DTYPES: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
}


@dataclass(frozen=True)
class Step:
    """One operation of an expression, with the shape and dtype it results in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    apply: Callable[[torch.Tensor], torch.Tensor]


class LazyWeight(ir.LazyTensor):
    """A checkpoint tensor and the steps that make a weight of it; computed each time it is asked for, never kept."""

    def __init__(self, source: CheckpointTensor, steps: tuple[Step, ...] = ()) -> None:
        last = steps[-1] if steps else source
        self.source = source
        self.steps = steps
        self.torch_dtype = last.dtype
        self.sizes = last.shape
        super().__init__(
            lambda: ir.tensor_adapters.TorchTensor(self.evaluate()),
            DTYPES[last.dtype],
            ir.Shape(last.shape),
            name=source.name,
        )

    def rebase(self, source: CheckpointTensor) -> "LazyWeight":
        """The same steps on another tensor of the same shape.

        Raises:
            CheckpointError: when the shape differs.
        """
        return LazyWeight(source.expect(self.source.shape), self.steps)

    def _then(
        self, shape: tuple[int, ...], apply: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None
    ) -> "LazyWeight":
        return LazyWeight(self.source, (*self.steps, Step(shape, dtype or self.torch_dtype, apply)))

    def select(self, axis: int, indices: npt.NDArray[np.int64]) -> "LazyWeight":
        """Keep `indices` along `axis`."""
        if len(indices) == self.sizes[axis]:
            return self
        shape = list(self.sizes)
        shape[axis] = len(indices)
        return self._then(tuple(shape), lambda t: t.index_select(axis, torch.from_numpy(indices)))

    def transpose(self) -> "LazyWeight":
        """[rows, columns] -> [columns, rows]."""
        return self._then(self.sizes[::-1], lambda t: t.t())

    def pad_last(self, width: int) -> "LazyWeight":
        """Append zeros to the last axis until it is `width` wide."""
        missing = width - self.sizes[-1]
        return self._then((*self.sizes[:-1], width), lambda t: torch.nn.functional.pad(t, (0, missing)))

    def cast(self, dtype: torch.dtype) -> "LazyWeight":
        """Convert to `dtype`, rounding to nearest."""
        return self if dtype == self.torch_dtype else self._then(self.sizes, lambda t: t.to(dtype), dtype)

    def evaluate(self) -> torch.Tensor:
        """The value, contiguous.

        Raises:
            CheckpointError: when it cannot be read, or holds NaN or infinity.
        """
        try:
            value = self.source.read()
            for step in self.steps:
                value = step.apply(value)
            value = value.contiguous()
        except (RuntimeError, OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.source.file}: tensor {self.source.name} cannot be read ({str(error).splitlines()[0]})"
            ) from error
        # One pass that allocates nothing: NaN and infinity both survive a minimum or maximum.
        if value.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(value)):
            raise CheckpointError(
                f"{self.source.file}: tensor {self.source.name} holds NaN or infinity as "
                f"{str(self.torch_dtype).removeprefix('torch.')}; if its stored values are finite, use a wider --dtype"
            )
        return value

    def __repr__(self) -> str:
        return f"LazyWeight({self.source.name}, {self.dtype}, {self.sizes})"
