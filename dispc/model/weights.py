"""Lazy weight expressions: what a pruned weight is made of, evaluated only while the artifact is written.

    checkpoint tensor [out, in] -> rows -> columns -> arithmetic -> cast -> pad or fill -> transpose (-> concat)

Each method returns a new expression; nothing is read before `evaluate`. The expressions are onnx_ir tensors, so that
graphs carry them as initializers.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from safetensors import SafetensorError

from dispc.masks import Indices
from dispc.model.storage import CheckpointTensor
from dispc.support.dtypes import name_of
from dispc.support.errors import CheckpointError, DispcError

PIECE_BYTES = 3 * 2**19
"""Stored rows are worked on in pieces of this size, which stay in the processor's cache from one step to the next."""
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the same size: numpy has no bfloat16, and taking indices only moves bits."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is done to a stored tensor, in this order: rows, columns, arithmetic, dtype, zeros, transposition.

    The arithmetic is `(value + offset) * factor`, in float32 or wider.

    `pad_rows` and `pad_columns` count zeros after what is kept; where `fill_rows` or `fill_columns` is set, what was
    not kept is zero instead of gone.
    """

    rows: Indices | None = None
    columns: Indices | None = None
    offset: float = 0.0
    factor: float = 1.0
    dtype: torch.dtype | None = None
    pad_rows: int = 0
    pad_columns: int = 0
    fill_rows: bool = False
    fill_columns: bool = False
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
        self.kept = tuple(
            size if indices is None else len(indices)
            for indices, size in zip((self.recipe.rows, self.recipe.columns), source.shape, strict=False)
        )
        fills = (self.recipe.fill_rows, self.recipe.fill_columns)
        pads = (self.recipe.pad_rows, self.recipe.pad_columns)
        stored = [
            (size if fill else kept) + pad
            for size, kept, fill, pad in zip(source.shape, self.kept, fills, pads, strict=False)
        ]
        self.sizes = tuple(reversed(stored) if self.recipe.transposed else stored)
        super().__init__(
            lambda: ir.tensor_adapters.TorchTensor(self.evaluate()),
            from_torch_dtype(self.torch_dtype),
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
        stored = self._stored(axis)
        earlier: Indices | None = getattr(self.recipe, stored)
        return self._with(**{stored: indices if earlier is None else earlier[indices]})

    def transpose(self) -> "LazyWeight":
        """[rows, columns] -> [columns, rows]."""
        return self._with(transposed=not self.recipe.transposed)

    def pad(self, axis: int, width: int) -> "LazyWeight":
        """Append zeros along `axis` until it is `width` wide."""
        stored = self._stored(axis)
        more = width - self.sizes[axis] + int(getattr(self.recipe, f"pad_{stored}"))
        return self._with(**{f"pad_{stored}": more})

    def fill(self, axis: int) -> "LazyWeight":
        """Give `axis` its full width back, with zeros where it was not kept."""
        stored = self._stored(axis)
        kept = getattr(self.recipe, stored)
        return self if kept is None else self._with(**{f"fill_{stored}": True, f"pad_{stored}": 0})

    def add(self, offset: float) -> "LazyWeight":
        """Add a number, before all multiplications."""
        return self._with(offset=self.recipe.offset + offset) if offset else self

    def multiply(self, factor: float) -> "LazyWeight":
        """Multiply by a number."""
        return self._with(factor=self.recipe.factor * factor)

    def cast(self, dtype: torch.dtype) -> "LazyWeight":
        """Convert to `dtype`, rounding to nearest."""
        return self._with(dtype=dtype)

    def _with(self, **changes: Any) -> "LazyWeight":
        return LazyWeight(self.source, replace(self.recipe, **changes))

    def _stored(self, axis: int) -> str:
        return "rows" if axis % len(self.sizes) == int(self.recipe.transposed) else "columns"

    def _compute(self, stored: torch.Tensor, value: torch.Tensor) -> None:
        recipe = self.recipe
        target = value.t() if recipe.transposed else value
        count = self.kept[0]
        if value.numel() > math.prod(self.kept):
            value.zero_()
        columns: Any = None
        if recipe.columns is not None:
            columns = torch.from_numpy(recipe.columns) if recipe.fill_columns else slice(0, len(recipe.columns))
        elif len(self.kept) > 1:
            columns = slice(0, self.kept[1])
        step = max(1, PIECE_BYTES * stored.shape[0] // max(1, stored.nbytes))
        for start in range(0, count, step):
            rows: Any = slice(start, min(start + step, count))
            piece = stored[rows]
            if recipe.rows is not None:
                piece = _take(stored, recipe.rows[rows], 0)
                if recipe.fill_rows:
                    rows = torch.from_numpy(recipe.rows[rows])
            if recipe.columns is not None:
                piece = _take(piece, recipe.columns, 1)
            piece = _cast(self._arithmetic(piece), self.torch_dtype)
            if columns is None or isinstance(columns, slice):
                target[(rows, columns) if columns is not None else rows] = piece
            else:
                target[(rows[:, None] if isinstance(rows, torch.Tensor) else rows, columns)] = piece

    def _arithmetic(self, piece: torch.Tensor) -> torch.Tensor:
        if (self.recipe.offset, self.recipe.factor) == (0.0, 1.0):
            return piece
        wide = piece.to(torch.promote_types(piece.dtype, torch.float32))
        return (wide + self.recipe.offset) * self.recipe.factor

    def evaluate(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The value, contiguous; or written into `out`, a view of the same shape and dtype.

        Raises:
            CheckpointError: when it cannot be read, is stored with NaN or infinity, or overflows the dtype asked for.
        """
        try:
            stored = self.source.read()
            # Also what is pruned away: the reference multiplies it by zero, which does not make NaN a number.
            if not _finite(stored):
                raise CheckpointError(f"{self.source.file}: tensor {self.source.name} holds NaN or infinity")
            value = torch.empty(self.sizes, dtype=self.torch_dtype) if out is None else out
            self._compute(stored, value)
        except (RuntimeError, OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.source.file}: tensor {self.source.name} cannot be read ({str(error).splitlines()[0]})"
            ) from error
        computed = self.torch_dtype != stored.dtype or self.recipe.factor != 1.0
        if computed and not _finite(value):
            dtype = name_of(self.torch_dtype)
            raise CheckpointError(
                f"{self.source.file}: tensor {self.source.name} overflows {dtype}; use a wider --dtype"
            )
        return value

    def __repr__(self) -> str:
        return f"LazyWeight({self.source.name}, {self.dtype}, {self.sizes})"


class ConcatWeight(ir.LazyTensor):
    """Weights of the same rows side by side: [K,N1], [K,N2], ... as [K,N1+N2+...] (or vectors end to end)."""

    def __init__(self, parts: Sequence[LazyWeight]) -> None:
        self.parts = tuple(parts)
        first = self.parts[0]
        if any(part.sizes[:-1] != first.sizes[:-1] or part.torch_dtype != first.torch_dtype for part in self.parts):
            raise ValueError(f"{list(self.parts)} do not stand side by side")
        self.sizes = (*first.sizes[:-1], sum(part.sizes[-1] for part in self.parts))
        super().__init__(
            lambda: ir.tensor_adapters.TorchTensor(self.evaluate()),
            from_torch_dtype(first.torch_dtype),
            ir.Shape(self.sizes),
        )

    def evaluate(self) -> torch.Tensor:
        """The value, contiguous.

        Raises:
            CheckpointError: as `LazyWeight.evaluate` does.
        """
        value = torch.empty(self.sizes, dtype=self.parts[0].torch_dtype)
        pieces = torch.split(value, [part.sizes[-1] for part in self.parts], dim=-1)
        for part, piece in zip(self.parts, pieces, strict=True):
            part.evaluate(piece)
        return value

    def __repr__(self) -> str:
        return f"ConcatWeight({', '.join(map(repr, self.parts))})"


def weight_of(value: ir.Value | None) -> LazyWeight:
    """The weight that an initializer of a graph stands for."""
    assert value is not None and isinstance(value.const_value, LazyWeight)
    return value.const_value


def rebind(value: ir.Value | None, weight: LazyWeight) -> None:
    """Let an initializer stand for another weight, under its own name."""
    assert value is not None
    weight.name = value.name
    value.const_value, value.shape = weight, weight.shape


def _finite(tensor: torch.Tensor) -> bool:
    """No NaN and no infinity: both survive a minimum or maximum, which is one pass and allocates nothing."""
    return not tensor.numel() or all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


def _take(tensor: torch.Tensor, indices: Indices, axis: int) -> torch.Tensor:
    """index_select by numpy, which is several times as fast as torch's on the last axis."""
    bits = tensor.view(BITS[tensor.element_size()]).numpy()
    return torch.from_numpy(bits.take(indices, axis)).view(tensor.dtype)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`; bfloat16 and float16 meet in float32, three times as fast and with the same bits."""
    both = {tensor.dtype, dtype}
    return (tensor.float() if both == {torch.bfloat16, torch.float16} else tensor).to(dtype)


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
