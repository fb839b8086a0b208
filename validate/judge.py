"""`dispc.validate.check`: run an artifact in every relevant way, and judge it against the masked reference."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dispc.support.check import Check
from dispc.validate.checks.drill import drill_down
from dispc.validate.checks.scenarios import PREFILL
from dispc.validate.checks.table import CHECKS
from dispc.validate.comparison import Comparison, Options
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
    **options: Any,
) -> Report:
    """Judge `artifact` against the model of `reference`, by every row of `CHECKS` that applies.

    `drill` compares block by block even when parity holds; where it does not, that is done anyway. `baseline` is an
    earlier report: no figure may be worse by more than the share `max_regression`. `say` gets the name of each check
    before it runs. The other options are those of `Options`.

    Raises:
        DispcError: when the comparison cannot be made; nothing was judged then.
    """
    older = read_report(baseline) if baseline else None
    comparison = Comparison(Path(artifact), Path(reference), Options(**options))
    quick = comparison.options.quick
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
