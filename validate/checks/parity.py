"""How far an artifact is from the truth, and how far it may be.

The reference in float64 is the truth; the reference in the artifact's dtype shows the dtype's own error. Per
position the artifact may be off by a small factor of that cost. docs/parity.md says why, with figures.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from dispc.evaluate.perplexity import Perplexity
from dispc.reference.truth import TINY, TOLERANCE, Answers, Text, divergence
from dispc.support.arrays import Array
from dispc.support.errors import ArtifactError
from dispc.validate.checks.check import Check
from dispc.validate.client import Row

LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest error of a dtype as a share of the logits' range: for graphs between passes, and where no truth is finer."""
KL_FLOOR = 1e-12
"""nats; the divergence that rounding in float64 makes of equal logits."""
TIMES = "x own error"


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """How much worse than its dtype an artifact may be.

    `error` and `kl` are factors of what the dtype itself costs, `top1` and `greedy` shares of positions at which
    another token is chosen for more than a tie within the error budget, `perplexity` a relative difference.
    A divergence grows with the square of the error after it, so its factor is the square of the other.
    """

    error: float = 4.0
    kl: float = 16.0
    top1: float = 0.01
    greedy: float = 0.0
    perplexity: float = 0.01

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if not math.isfinite(limit):
                raise ArtifactError(f"--max-{name} is {limit}; a limit is a finite number")


DEFAULTS = Thresholds()


@dataclass(frozen=True)
class Distance:
    """How far one output of one row is from the truth, at its positions [n].

    `error` is the largest difference, `own` what the dtype costs there, `range` that of the truth over its whole text.
    Of logits there are the divergences in nats as well, whether the likeliest token is `another` one, and by how much
    the truth prefers its own (`gap`).
    """

    error: Array
    own: Array
    range: float
    divergence: Array
    own_divergence: Array
    another: Array
    gap: Array
    dimensions: Array
    """Largest difference of each dimension [width] over all positions."""

    @property
    def ratio(self) -> Array:
        """Error in units of the dtype's own; infinite where the output is not finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            ratio = self.error / self.own
        result: Array = np.where(np.isfinite(ratio), ratio, np.inf)
        return result

    def part(self, where: slice) -> "Distance":
        """The same at some of its positions."""
        cut = ("error", "own", "divergence", "own_divergence", "another", "gap")
        return replace(self, **{name: getattr(self, name)[where] for name in cut})


def measure(rows: Sequence[Row], answers: Answers, name: str = "logits") -> list[Distance]:
    """The distance of each row's output `name`; both are compared a few positions at a time, and not kept.

    `own` is at least the 90th percentile of the own errors; smaller ones are chance.
    """
    by_source: dict[Text, list[int]] = {}
    for number, row in enumerate(rows):
        by_source.setdefault(answers.source(row.text), []).append(number)
    by_row: dict[int, Distance] = {}
    for source, numbers in by_source.items():
        measured = _measure(source, [rows[number] for number in numbers], answers, name)
        by_row |= dict(zip(numbers, measured, strict=True))
    distances = [by_row[number] for number in range(len(rows))]
    floor = max(float(np.quantile(np.concatenate([each.own for each in distances]), 0.9)), TINY)
    return [replace(each, own=np.maximum(each.own, floor)) for each in distances]


def _measure(source: Text, rows: Sequence[Row], answers: Answers, name: str) -> list[Distance]:
    """The distances of rows whose texts begin `source`."""
    at = np.unique(np.concatenate([row.at for row in rows]))
    own, own_divergence = np.zeros((2, len(source.tokens)))
    of_rows = [np.zeros((4, len(row.at))) for row in rows]
    dimensions: list[Any] = [0.0 for _ in rows]
    low, high = np.inf, -np.inf
    for piece in answers.pieces(source, name, at):
        truth = piece.truth.astype(np.float64)
        low, high = min(low, float(truth.min())), max(high, float(truth.max()))
        for each in piece.own:
            own[piece.at] = np.maximum(own[piece.at], np.abs(each - truth).max(axis=-1))
            if name == "logits":
                own_divergence[piece.at] += divergence(truth, each) / len(piece.own)
        for number, row in enumerate(rows):
            where = np.flatnonzero((row.at >= piece.at[0]) & (row.at <= piece.at[-1]))
            if not len(where):
                continue
            expected, output = truth[np.searchsorted(piece.at, row.at[where])], row.outputs[name][where]
            difference = np.abs(output - expected)
            dimensions[number] = np.maximum(dimensions[number], difference.max(axis=0))
            of_rows[number][0, where] = difference.max(axis=-1)
            if name == "logits":
                lines, ours, theirs = np.arange(len(where)), output.argmax(axis=-1), expected.argmax(axis=-1)
                of_rows[number][1:, where] = (
                    divergence(expected, output),
                    ours != theirs,
                    expected[lines, theirs] - expected[lines, ours],
                )
    spread = max(high - low, TINY)
    if not answers.has_own:
        own = np.full(len(source.tokens), TOLERANCE[answers.dtype] * spread)
        own_divergence = 0.5 * own**2
    return [
        Distance(
            error=error,
            own=own[row.at],
            range=spread,
            divergence=nats,
            own_divergence=own_divergence[row.at],
            another=another.astype(bool),
            gap=gap,
            dimensions=dimension,
        )
        for row, (error, nats, another, gap), dimension in zip(rows, of_rows, dimensions, strict=True)
    ]


def judge_logits(
    name: str, rows: Sequence[Row], distances: Sequence[Distance], detail: str, limit: float | None
) -> Check:
    """The worst position of a scenario against the error budget; noted only, where `limit` is None."""
    ratios = [each.ratio for each in distances]
    worst = int(np.argmax([ratio.max() for ratio in ratios]))
    at = int(ratios[worst].argmax())
    error, own = float(distances[worst].error[at]), float(distances[worst].own[at])
    where = f"token {int(rows[worst].at[at])}" + (f" of row {worst}" if len(rows) > 1 else "")
    shown = f"error {error:.2e}" if np.isfinite(error) else "NaN or infinity"
    return Check.against(
        name,
        "parity",
        float(ratios[worst].max()),
        limit,
        TIMES,
        f"{detail}; worst {shown} at {where}, own {own:.2e}",
        error=max(float(each.error.max()) for each in distances),
        error_of_range=max(float(each.error.max() / each.range) for each in distances),
        own_error=max(float(each.own.max()) for each in distances),
        worst_position=where,
    )


def judge_choices(name: str, distances: Sequence[Distance], detail: str, factor: float, limit: float) -> Check:
    """The share of positions at which the artifact's likeliest token is not the truth's.

    A tie does not count: where the truth has the two tokens within `factor` times the own error of each other.
    """
    positions = sum(len(each.error) for each in distances)
    different = sum(int(each.another.sum()) for each in distances)
    unexplained = sum(
        int((each.another & ~((each.gap <= factor * each.own) & np.isfinite(each.error))).sum()) for each in distances
    )
    return Check.against(
        name,
        "parity",
        unexplained / positions,
        limit,
        "of the positions",
        f"{detail}; {different} of {positions} differ, {different - unexplained} of them ties within the budget",
        agreement=1 - different / positions,
    )


def judge_divergence(distances: Sequence[Distance], limit: float) -> Check:
    """Mean KL(truth || artifact) in units of what the dtype itself costs."""
    mean = float(np.concatenate([each.divergence for each in distances]).mean())
    cost = float(np.concatenate([each.own_divergence for each in distances]).mean())
    figure = mean / max(cost, KL_FLOOR) if np.isfinite(mean) else float("inf")
    positions = sum(len(each.error) for each in distances)
    detail = f"mean {mean:.1e} nats over {positions} positions, own {cost:.1e}"
    return Check.against("KL divergence", "parity", figure, limit, "x own divergence", detail, nats=mean, own_nats=cost)


def logit_error(found: Array, expected: Array) -> float:
    """Largest absolute difference over the range of `expected`; infinite when `found` holds NaN or infinity."""
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(np.ptp(expected), np.finfo(np.float32).tiny))


def judge_perplexities(name: str, ours: Perplexity, theirs: Perplexity, limit: float | None) -> Check:
    """The relative difference of two perplexities over the same windows; noted only, where `limit` is None."""
    a, b = ours.perplexity, theirs.perplexity
    detail = (
        f"{a:.4f} against {b:.4f} on {ours.data}, {ours.windows} windows of {ours.sequence_length}, "
        f"{ours.tokens_scored:,} tokens scored"
    )
    return Check.against(name, "perplexity", abs(a - b) / b, limit, "relative", detail, artifact=a, reference=b)
