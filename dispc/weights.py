"""Lazy weight expressions: what a pruned weight is made of, evaluated only while the artifact is written.

    checkpoint tensor [out, in] -> rows -> columns -> cast -> pad -> transpose

Each method returns a new expression; nothing is read before `evaluate`. The expressions are onnx_ir tensors, so that
graphs carry them as initializers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from safetensors import SafetensorError

from dispc.checkpoint import CheckpointTensor
from dispc.errors import CheckpointError, DispcError
from dispc.masks import Indices

DTYPES: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
}


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is done to a stored tensor, in this order: rows, columns, dtype, padding of the rows, transposition."""

    rows: Indices | None = None
    columns: Indices | None = None
    dtype: torch.dtype | None = None
    padding: int = 0
    transposed: bool = False


class LazyWeight(ir.LazyTensor):
    """A checkpoint tensor and the recipe that makes a weight of it; computed each time it is asked for, never kept.

    Whatever order the methods are called in, what is pruned away goes first and the transposition comes last: slices of
    stored rows are cheap, and every later step then touches only what is kept.
    """

    def __init__(self, source: CheckpointTensor, recipe: Recipe | None = None) -> None:
        self.source = source
        self.recipe = recipe or Recipe()
        self.torch_dtype = self.recipe.dtype or source.dtype
        kept = zip((self.recipe.rows, self.recipe.columns), source.shape, strict=False)
        stored = [size if indices is None else len(indices) for indices, size in kept]
        stored[:1] = [size + self.recipe.padding for size in stored[:1]]
        self.sizes = tuple(reversed(stored) if self.recipe.transposed else stored)
        super().__init__(
            lambda: ir.tensor_adapters.TorchTensor(self.evaluate()),
            DTYPES[self.torch_dtype],
            ir.Shape(self.sizes),
            name=source.name,
        )

    def rebase(self, source: CheckpointTensor) -> "LazyWeight":
        """The same recipe on another tensor of the same shape.

        Raises:
            CheckpointError: when the shape differs.
        """
        return LazyWeight(source.expect(self.source.shape), self.recipe)

    def select(self, axis: int, indices: Indices) -> "LazyWeight":
        """Keep `indices` along `axis`."""
        if len(indices) == self.sizes[axis]:
            return self
        stored = "rows" if axis == int(self.recipe.transposed) else "columns"
        earlier: Indices | None = getattr(self.recipe, stored)
        return self._with(**{stored: indices if earlier is None else earlier[indices]})

    def transpose(self) -> "LazyWeight":
        """[rows, columns] -> [columns, rows]."""
        return self._with(transposed=not self.recipe.transposed)

    def pad_last(self, width: int) -> "LazyWeight":
        """Append zeros to the last axis until it is `width` wide. The last axis must be the stored rows."""
        assert self.recipe.transposed or len(self.sizes) == 1, "only outputs of a projection are padded"
        return self._with(padding=width - self.sizes[-1] + self.recipe.padding)

    def cast(self, dtype: torch.dtype) -> "LazyWeight":
        """Convert to `dtype`, rounding to nearest."""
        return self._with(dtype=dtype)

    def _with(self, **changes: Any) -> "LazyWeight":
        return LazyWeight(self.source, replace(self.recipe, **changes))

    def _compute(self) -> torch.Tensor:
        recipe, value = self.recipe, self.source.read()
        for axis, indices in enumerate((recipe.rows, recipe.columns)):
            if indices is not None:
                value = value.index_select(axis, torch.from_numpy(indices))
        value = value.to(self.torch_dtype)
        if recipe.padding:
            value = torch.nn.functional.pad(value, (0,) * (2 * value.ndim - 1) + (recipe.padding,))
        return (value.t() if recipe.transposed else value).contiguous()

    def evaluate(self) -> torch.Tensor:
        """The value, contiguous.

        Raises:
            CheckpointError: when it cannot be read, or holds NaN or infinity.
        """
        try:
            value = self._compute()
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


@contextmanager
def surface_weight_errors() -> Iterator[None]:
    """Let the errors of `evaluate` through as they are: onnx_ir wraps those of tensors that it serialises inline."""
    try:
        yield
    except ir.serde.SerdeError as error:
        cause: BaseException | None = error
        while isinstance(cause, ir.serde.SerdeError):
            cause = cause.__cause__
        if isinstance(cause, DispcError):
            raise cause from None
        raise
