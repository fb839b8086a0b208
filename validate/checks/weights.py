"""The weights beside those that dispc computes from the checkpoint: some changes hardly move any logit.

Scales that are all 2 % too large before a norm are such a change: the norm divides by them again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from dispc.quantisation import Quantisation, product_of
from dispc.reference.integers import KINDS
from dispc.support.arrays import Array
from dispc.support.errors import DispcError
from dispc.validate.checks.check import Check
from dispc.validate.checks.graph import other_releases
from dispc.validate.comparison import Comparison

NAME = "weights"
UNITS = 2.0
"""Units in the last place, at the largest number of a row, that a number may be off: cosines differ between CPUs."""
EPSILONS = {
    ir.DataType.FLOAT: 2.0**-23,
    ir.DataType.FLOAT16: 2.0**-10,
    ir.DataType.BFLOAT16: 2.0**-7,
}
"""The unit in the last place of numbers from 1 to 2."""
PIECE = 2**22
"""Numbers compared at a time."""


class Farthest(NamedTuple):
    """The largest error, in units in the last place of its tensor's dtype, and the tensor's name."""

    units: float
    name: str


NOTHING = Farthest(np.inf, "that there is none of those expected")


def judge_weights(comparison: Comparison) -> Iterator[Check]:
    """Every weight and table, computed again; integers and what goes with them bit for bit.

    Left out are integers of algorithms that cannot be repeated: the reference multiplies by those, and judges them.
    """
    try:
        found, expected = comparison.graph().graph.initializers, comparison.rewritten.graph.initializers
        names = [name for name in expected if name in found and _repeatable(name, comparison)]
        worst = max((Farthest(_error(found[name], expected[name]), name) for name in names), default=NOTHING)
    except DispcError as error:
        yield Check.failed(NAME, "static", str(error))
        return
    detail = f"{len(names)} tensors; worst is {worst.name}"
    check = Check.against(NAME, "static", worst.units, UNITS, "units in the last place", detail)
    if not check.passed and (others := other_releases(comparison)):
        check = Check(
            name=NAME, group="static", status="noted", detail=f"not judged (compiled with {others}): {detail}"
        )
    yield check


def _repeatable(name: str, comparison: Comparison) -> bool:
    """Whether the initializer `name` has the same values whenever and wherever it is computed."""
    options: Quantisation | None = comparison.manifest.quantisation
    weight, _, kind = name.rpartition(".")
    if options is None or kind not in KINDS:
        return True
    return options.of(product_of(weight, comparison.checkpoint.family)).rounding.repeatable


def _error(found: ir.Value, expected: ir.Value) -> float:
    """In units in the last place; infinite for another dtype, another shape or other integers."""
    ours, theirs = found.const_value, expected.const_value
    assert ours is not None and theirs is not None
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return np.inf
    epsilon = EPSILONS.get(theirs.dtype)
    values, wanted = ours.numpy(), theirs.numpy()
    if epsilon is None or (expected.name or "").rpartition(".")[2] in KINDS:
        return 0.0 if np.array_equal(values, wanted) else np.inf
    if not values.size:
        return 0.0
    rows = wanted.reshape(-1, wanted.shape[-1] if wanted.ndim else 1)
    count = max(1, -(-rows.size // PIECE))
    pieces = zip(np.array_split(values.reshape(rows.shape), count), np.array_split(rows, count), strict=True)
    return max(_units(mine, other, epsilon) for mine, other in pieces if len(other))


def _units(values: Array, wanted: Array, epsilon: float) -> float:
    """Of two matrices [n, width]."""
    if np.array_equal(values, wanted):
        return 0.0
    mine, other = (np.asarray(each, dtype=np.float32) for each in (values, wanted))
    largest = np.abs(other).max(axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)
    return float(np.nan_to_num(np.abs(mine - other) / (epsilon * largest), nan=np.inf).max())
