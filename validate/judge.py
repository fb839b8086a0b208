"""`dispc.validate.check`: run an artifact in every relevant way, and judge it against the masked reference."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dispc.runtime.latency import LatencyOptions
from dispc.support.check import Check
from dispc.validate.checks import parity
from dispc.validate.checks.drill import drill_down
from dispc.validate.checks.parity import Thresholds
from dispc.validate.checks.scenarios import PREFILL
from dispc.validate.checks.table import CHECKS
from dispc.validate.comparison import Comparison, Device, Options
from dispc.validate.report.baseline import compare, read_report
from dispc.validate.report.report import Drill, Report


def check(
    artifact: Path,
    reference: Path,
    *,
    drill: bool = False,
    baseline: Path | None = None,
    max_regression: float = 0.05,
    say: Callable[[str], None] = lambda what: None,
    thresholds: Thresholds | None = None,
    device: Device = "target",
    quick: bool = False,
    reference_dtype: str | None = None,
    masks: Path | None = None,
    data: str | None = None,
    sequence_length: int | None = None,
    max_windows: int | None = None,
    latency: LatencyOptions | None = None,
    dense: Path | None = None,
    seed: int = 0,
) -> Report:
    """Judge `artifact` against the model of `reference`, by every row of `CHECKS` that applies.

    Args:
        artifact: the directory that `dispc compile` wrote.
        reference: the model directory that it was compiled from.
        drill: compare block by block even when parity holds; where it does not, that is done anyway.
        baseline: an earlier report; no figure may be worse than there by more than the share `max_regression`.
        max_regression: that share.
        say: gets the name of each check before it runs.
        thresholds: what is allowed; None: the defaults of `Thresholds`.
        device: judge where the artifact is meant to run (`target`), on the `cpu`, or there where the target's provider
            is not `available`.
        quick: only what a compilation ends with.
        reference_dtype: of the truth, `float64` (None) or `float32`, which is twice as fast.
        masks: the masks that are meant; None: those beside the reference, where there are any.
        data: a text, as `dispc learn` takes it, to measure perplexity on, over `max_windows` windows (None: all) of
            `sequence_length` tokens (None: 2,048, or the model's limit).
        latency: measure times as these options say, beside the `dense` artifact where one is given.
        seed: of the prompts.

    Raises:
        DispcError: when the comparison cannot be made; nothing was judged then.
    """
    older = read_report(baseline) if baseline else None
    options = Options(
        thresholds=thresholds or parity.DEFAULTS,
        device=device,
        quick=quick,
        reference_dtype=reference_dtype,
        masks=masks,
        data=data,
        sequence_length=sequence_length,
        max_windows=max_windows,
        latency=latency,
        dense=dense,
        seed=seed,
    )
    comparison = Comparison(Path(artifact), Path(reference), options)
    checks: list[Check] = []
    for row in CHECKS:
        if row.quick or not quick:
            say(row.name)
            checks += row.run(comparison)
    say("drilling down")
    drilled = find_fault(comparison, checks, always=drill)
    placement = None if quick else comparison.placement[0]
    report = Report(
        **comparison.facts(),
        checks=tuple(checks),
        drill=drilled,
        perplexity=comparison.perplexities if comparison.options.data is not None else None,
        placement=placement.as_dict() if placement else None,
        latency=comparison.times,
        quick=quick,
        seed=comparison.options.seed,
    )
    return report if older is None else compare(report, older, max_regression)


def find_fault(comparison: Comparison, checks: Sequence[Check], *, always: bool) -> Drill | None:
    """Which sub-layer is wrong, where a check of parity failed; where none did, None unless `always`.

    Searched in the scenario that failed first (with widened weights where only that one failed). Where no logits are
    over their limit (only the chosen tokens differ, or what failed has no streams), in the one with the largest error.
    """
    failed = any(not check.passed for check in checks if check.group == "parity")
    if not (failed or always):
        return None
    limit = comparison.options.thresholds.error
    passes = [comparison, *([comparison.widened] if failed and comparison.widened else [])]
    candidates = [
        (max(float(each.ratio.max()) for each in part.found), part.run.scenario, judged)
        for judged in passes
        for part in judged.measured.values()
        if part.found and part.run.scenario.streams and not part.run.noted
    ]
    over = [each for each in candidates if each[0] > limit]
    if over:
        _, scenario, judged = over[0]
    elif failed and candidates:
        _, scenario, judged = max(candidates, key=lambda each: each[0])
    elif candidates:
        scenario, judged = PREFILL, comparison
    else:
        reason = next(check.detail for check in checks if not check.passed and check.group == "parity")
        return Drill(verdict=f"no drill: nothing could be run ({reason})", scenario="", limit=limit)
    return drill_down(judged, scenario, limit)
