"""The weights beside those that dispc computes from the checkpoint: some changes hardly move any logit.

Scales that are all 2 % too large before a norm are such a change: the norm divides by them again.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from dispc.algorithms import Algorithm
from dispc.quantisation import product_of
from dispc.reference.integers import KINDS
from dispc.support.arrays import Array
from dispc.support.errors import DispcError
from dispc.validate.checks.check import Check, listed
from dispc.validate.checks.rewriting import failed_or_noted, rewritten
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
REPEATED, SEARCHED, HALVES = 0.001, 0.01, 0.01
"""Share of the numbers of a tensor that may be others at all on another machine: integers and scales that are rounded
to the nearest or searched for, and numbers of 16 bits, whose units in the last place are most of a per cent."""
PIECE = 2**22
"""Numbers compared at a time."""


def judge_weights(comparison: Comparison) -> Iterator[Check]:
    """Every weight and table, computed again. What GPTQ rounded is left to the reference: it depends on a text.

    Other releases may compute them otherwise: a difference is noted then, and not judged.
    """
    try:
        found, expected = comparison.graph().graph.initializers, rewritten(comparison).graph.initializers
        algorithms = {name: algorithm_of(name, comparison) for name in expected}
        names = [name for name, algorithm in algorithms.items() if algorithm is None or not algorithm.reads_text]
        faults = [
            f"{name}: {what}"
            for name in names
            if (what := difference(found.get(name), expected[name], algorithms[name]))
        ]
    except DispcError as error:
        yield Check.failed(NAME, "static", str(error))
        return
    if faults:
        yield failed_or_noted(NAME, f"not what dispc computes: {listed(faults)}", comparison)
    else:
        detail = f"{len(names)} of {len(expected)} tensors computed again"
        yield Check(name=NAME, group="static", status="passed", detail=detail)


def algorithm_of(name: str, comparison: Comparison) -> Algorithm | None:
    """The algorithm that made the integers or scales `name`; None for other tensors."""
    options, checkpoint = comparison.manifest.quantisation, comparison.checkpoint
    weight, _, kind = name.rpartition(".")
    if options is None or kind not in KINDS:
        return None
    if weight == f"{checkpoint.family.embedding}.weight":
        with_head = checkpoint.config.tied and options.head
        return (options if with_head else options.without_text).rounding
    return options.of(product_of(weight, checkpoint.family)).rounding


def difference(found: ir.Value | None, expected: ir.Value, algorithm: Algorithm | None) -> str:
    """In words; empty where `found` has the values that are `expected`, or nearly."""
    if found is None:
        return "missing"
    ours, theirs = found.const_value, expected.const_value
    assert ours is not None and theirs is not None
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return f"{ours.dtype}{ours.shape}, not {theirs.dtype}{theirs.shape}"
    values, wanted = ours.numpy(), theirs.numpy()
    if algorithm is not None:
        return _others(values, wanted, REPEATED if algorithm.repeatable else SEARCHED)
    epsilon = EPSILONS.get(theirs.dtype)
    if epsilon is None:
        return "" if np.array_equal(values, wanted) else "other numbers"
    units = _units(values, wanted, epsilon)
    if not units <= UNITS:
        return f"off by {units:.3g} units in the last place (allowed {UNITS:g})"
    return "" if theirs.dtype == ir.DataType.FLOAT else _others(values, wanted, HALVES)


def _others(values: Array, wanted: Array, allowed: float) -> str:
    """In words, where more than the `allowed` share of the numbers, and more than one, are others."""
    count = int((values != wanted).sum())
    if count <= max(1, allowed * values.size):
        return ""
    return f"{100 * count / values.size:.3g} % of its numbers are others (allowed {100 * allowed:g} %)"


def _units(values: Array, wanted: Array, epsilon: float) -> float:
    """The largest error of a number, in units in the last place of the largest of its row; a few rows at a time."""
    width = wanted.shape[-1] if wanted.ndim else 1
    if not wanted.size:
        return 0.0
    rows, count = (-1, width), -(-wanted.size // PIECE)
    pieces = zip(np.array_split(values.reshape(rows), count), np.array_split(wanted.reshape(rows), count), strict=True)
    return max(_units_of_piece(ours, theirs, epsilon) for ours, theirs in pieces if len(theirs))


def _units_of_piece(values: Array, wanted: Array, epsilon: float) -> float:
    if np.array_equal(values, wanted):
        return 0.0
    ours, theirs = (np.asarray(each, dtype=np.float32) for each in (values, wanted))
    largest = np.abs(theirs).max(axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)
    return float(np.nan_to_num(np.abs(ours - theirs) / (epsilon * largest), nan=np.inf).max())
