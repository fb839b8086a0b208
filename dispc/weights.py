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


PIECE_BYTES = 3 * 2**19
"""Stored rows are worked on in pieces of this size, which stay in the processor's cache from one step to the next."""
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the same size: numpy has no bfloat16, and taking indices only moves bits."""


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

    def _compute(self, stored: torch.Tensor) -> torch.Tensor:
        recipe = self.recipe
        value = torch.empty(self.sizes, dtype=self.torch_dtype)
        target = value.t() if recipe.transposed else value
        count = stored.shape[0] if recipe.rows is None else len(recipe.rows)
        target[count:] = 0
        step = max(1, PIECE_BYTES * stored.shape[0] // max(1, stored.nbytes))
        for start in range(0, count, step):
            piece = stored[start : start + step]
            if recipe.rows is not None:
                piece = _take(stored, recipe.rows[start : start + step], 0)
            if recipe.columns is not None:
                piece = _take(piece, recipe.columns, 1)
            target[start : start + len(piece)] = piece.to(self.torch_dtype)
        return value

    def evaluate(self) -> torch.Tensor:
        """The value, contiguous.

        Raises:
            CheckpointError: when it cannot be read, is stored with NaN or infinity, or overflows the dtype asked for.
        """
        try:
            stored = self.source.read()
            # Also what is pruned away: the reference multiplies it by zero, which does not make NaN a number.
            if not _finite(stored):
                raise CheckpointError(f"{self.source.file}: tensor {self.source.name} holds NaN or infinity")
            value = self._compute(stored)
        except (RuntimeError, OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.source.file}: tensor {self.source.name} cannot be read ({str(error).splitlines()[0]})"
            ) from error
        if not _finite(value):
            dtype = str(self.torch_dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.source.file}: tensor {self.source.name} overflows {dtype}; use a wider --dtype"
            )
        return value

    def __repr__(self) -> str:
        return f"LazyWeight({self.source.name}, {self.dtype}, {self.sizes})"


def _finite(tensor: torch.Tensor) -> bool:
    """No NaN and no infinity: both survive a minimum or maximum, which is one pass and allocates nothing."""
    return not tensor.numel() or all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


def _take(tensor: torch.Tensor, indices: Indices, axis: int) -> torch.Tensor:
    """index_select by numpy, which is several times as fast as torch's on the last axis."""
    bits = tensor.view(BITS[tensor.element_size()]).numpy()
    return torch.from_numpy(bits.take(indices, axis)).view(tensor.dtype)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch work in the calling thread only, for work that is parallel already, or that must not vary."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
