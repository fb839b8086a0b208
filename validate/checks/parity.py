"""How far an artifact is from the truth, and how far it may be.

The reference in float64 is the truth; the reference in the artifact's dtype shows what that dtype costs by itself. Per
position the artifact may be off by a small factor of that cost. docs/parity.md says why, with figures.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dispc.evaluate.perplexity import Perplexity
from dispc.reference.truth import TINY, Answers, divergence
from dispc.runtime.session import Array, Artifact
from dispc.support.check import Check
from dispc.support.errors import ArtifactError
from dispc.validate.checks.scenarios import GREEDY, Row, Stage, Turn

LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest error of a dtype as a share of the logits' range: for graphs between passes, and where no truth is finer."""
INT8_ACTIVATIONS_LIMIT = 0.1
"""The same, for what the rounding of activations to int8 does to the last token's logits (docs/quantisation.md)."""
SHIPPED_LENGTHS, SHIPPED_STEPS = (17, 5, 9), 4
KL_FLOOR = 1e-12
"""nats; what rounding in float64 makes of a divergence of nothing."""
TIMES = "x own error"
LOGITS_CHECK = {GREEDY.name: "greedy logits"}
"""Scenario -> the check of its logits, where that does not have the scenario's name."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """How much worse than its dtype an artifact may be.

    `error` and `kl` are factors of what the dtype itself costs, `top1` and `greedy` shares of positions at which
    another token is chosen for more than a tie within the error budget, `perplexity` a relative difference.
    """

    error: float = 4.0
    kl: float = 4.0
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
    """One output of one row at its positions [n]: largest error, what the dtype costs there, and the truth's range."""

    error: Array
    own: Array
    range: float

    @property
    def ratio(self) -> Array:
        """Error in units of the dtype's own; infinite where the output is not finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            ratio = self.error / self.own
        result: Array = np.where(np.isfinite(ratio), ratio, np.inf)
        return result


def distance(row: Row, answers: Answers, name: str = "logits") -> Distance:
    """Of output `name` of `row`."""
    truth = answers.truth[row.text][name][row.at].astype(np.float64)
    error = np.abs(row.outputs[name].astype(np.float64) - truth).max(axis=-1)
    own = np.maximum(answers.own_error(row.text, name)[row.at], answers.floor(name))
    return Distance(error, own, max(float(np.ptp(truth)), TINY))


def judge(turns: Sequence[Turn], answers: Answers, thresholds: Thresholds) -> list[Check]:
    """A check for each scenario, and those over all of them: KL divergence and top-1 tokens."""
    checks: list[Check] = []
    judged: list[Row] = []
    for turn in turns:
        name = turn.scenario.name
        if turn.check is not None:
            checks.append(turn.check)
            continue
        limit = None if turn.told else thresholds.error
        if turn.scenario is GREEDY:
            checks.append(judge_logits(LOGITS_CHECK[name], turn.rows, turn.detail, answers, limit))
            steps = [row.part(slice(0, -1)) for row in turn.rows]  # behind the last nothing was chosen
            checks.append(judge_choices(name, steps, turn.detail, answers, thresholds.error, thresholds.greedy))
        else:
            checks.append(judge_logits(name, turn.rows, turn.detail, answers, limit))
        judged += [] if turn.told else turn.rows
    if judged:
        checks.append(judge_divergence(judged, answers, thresholds.kl))
        checks.append(
            judge_choices("top-1 tokens", judged, "all scenarios", answers, thresholds.error, thresholds.top1)
        )
    return checks


def judge_logits(name: str, rows: Sequence[Row], detail: str, answers: Answers, limit: float | None) -> Check:
    """The worst position of a scenario against the error budget; told only, where `limit` is None."""
    found = [distance(row, answers) for row in rows]
    ratios = [each.ratio for each in found]
    worst = int(np.argmax([ratio.max() for ratio in ratios]))
    at = int(ratios[worst].argmax())
    error, own = float(found[worst].error[at]), float(found[worst].own[at])
    where = f"token {int(rows[worst].at[at])}" + (f" of row {worst}" if len(rows) > 1 else "")
    shown = f"error {error:.2e}" if np.isfinite(error) else "NaN or infinity"
    return Check.against(
        name, "parity", float(ratios[worst].max()), limit, TIMES,
        f"{detail}; worst {shown} at {where}, own {own:.2e}",
        error=max(float(each.error.max()) for each in found),
        error_of_range=max(float(each.error.max() / each.range) for each in found),
        own_error=max(float(each.own.max()) for each in found),
        worst_position=where,
    )  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """Whether the artifact's likeliest token is the truth's: different, and different by more than a tie."""

    positions: int
    different: int
    unexplained: int


def choices(rows: Sequence[Row], answers: Answers, factor: float) -> Choices:
    """A different choice is a tie where the truth holds the two tokens for equal within the error budget."""
    positions = different = unexplained = 0
    for row in rows:
        truth = answers.truth[row.text]["logits"][row.at]
        found = distance(row, answers)
        lines = np.arange(len(truth))
        ours, theirs = row.outputs["logits"].argmax(axis=-1), truth.argmax(axis=-1)
        gap = truth[lines, theirs] - truth[lines, ours]
        other = ours != theirs
        positions += len(truth)
        different += int(other.sum())
        unexplained += int((other & ~((gap <= factor * found.own) & np.isfinite(found.error))).sum())
    return Choices(positions, different, unexplained)


def judge_choices(name: str, rows: Sequence[Row], detail: str, answers: Answers, factor: float, limit: float) -> Check:
    """The share of positions at which another token is chosen, ties within `factor` times the own error excused."""
    found = choices(rows, answers, factor)
    share = found.unexplained / found.positions
    return Check.against(
        name, "parity", share, limit, "of the positions",
        f"{detail}; {found.different} of {found.positions} differ, "
        f"{found.different - found.unexplained} of them ties within the budget",
        agreement=1 - found.different / found.positions,
    )  # fmt: skip


def judge_divergence(rows: Sequence[Row], answers: Answers, limit: float) -> Check:
    """Mean KL(truth || artifact) in units of what the dtype itself costs."""
    ours, own = [], []
    for row in rows:
        truth = answers.truth[row.text]["logits"][row.at]
        ours.append(divergence(truth, row.outputs["logits"]))
        own.append(answers.own_divergence(row.text)[row.at])
    mean, cost = float(np.concatenate(ours).mean()), float(np.concatenate(own).mean())
    figure = mean / max(cost, KL_FLOOR) if np.isfinite(mean) else float("inf")
    detail = f"mean {mean:.1e} nats over {sum(map(len, ours))} positions, own {cost:.1e}"
    return Check.against("KL divergence", "parity", figure, limit, "x own divergence", detail, nats=mean, own_nats=cost)


def judge_shipped(shipped: Artifact, exact: Artifact, stage: Stage) -> Check:
    """The artifact as it is against the graph that the other checks ran (`Artifact`, exact): each row's last token.

    A prefill, and SHIPPED_STEPS steps behind it.
    """
    tokens = [stage.tokens(100 + length, min(length, stage.length)).tolist() for length in SHIPPED_LENGTHS]
    (found, ours), (expected, theirs) = shipped.prefill(tokens), exact.prefill(tokens)
    error = logit_error(found, expected)
    for _ in range(SHIPPED_STEPS):
        chosen = expected.argmax(axis=-1)
        (found, ours), (expected, theirs) = shipped.step(chosen, ours), exact.step(chosen, theirs)
        error = max(error, logit_error(found, expected))
    what = [name for name, has in (("int8 activations", shipped.int8_activations),
                                   ("last logits", shipped.last_logits)) if has]  # fmt: skip
    limit = INT8_ACTIVATIONS_LIMIT if shipped.int8_activations else LIMITS[shipped.dtype]
    detail = f"{len(tokens)} prompts and {SHIPPED_STEPS} steps, last tokens; the other checks are of the graph without"
    return Check.against(", ".join(what), "parity", error, limit, "of the range", f"{detail} {' and '.join(what)}")


def logit_error(found: Array, expected: Array) -> float:
    """Largest absolute difference over the range of `expected`; infinite when `found` holds NaN or infinity."""
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(np.ptp(expected), np.finfo(np.float32).tiny))


def judge_perplexity(name: str, ours: Perplexity, theirs: Perplexity, limit: float | None) -> Check:
    """The relative difference of two perplexities over the same windows; told only, where `limit` is None."""
    a, b = ours.perplexity, theirs.perplexity
    detail = (
        f"{a:.4f} against {b:.4f} on {ours.data}, {ours.windows} windows of {ours.sequence_length}, "
        f"{ours.tokens_scored:,} tokens scored"
    )
    return Check.against(name, "perplexity", abs(a - b) / b, limit, "relative", detail, artifact=a, reference=b)
