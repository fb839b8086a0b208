"""`dispc.validate.check`: run an artifact in every relevant way, and judge it against the masked reference."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dispc.runtime.placement import Placement
from dispc.support.errors import ArtifactError
from dispc.support.inputs import named_in_text
from dispc.validate.checks.check import Check
from dispc.validate.checks.drill import drill_down
from dispc.validate.checks.scenarios import PREFILL
from dispc.validate.checks.table import CHECKS
from dispc.validate.comparison import Comparison
from dispc.validate.options import CheckOptions
from dispc.validate.report.baseline import compare, read_report
from dispc.validate.report.report import Drill, Report


def check(
    artifact: Path,
    reference: Path,
    options: CheckOptions | None = None,
    *,
    say: Callable[[str], None] = lambda what: None,
) -> Report:
    """Judge `artifact` against the model of `reference`, by every row of `CHECKS` that applies.

    Args:
        artifact: the directory that `dispc compile` wrote.
        reference: the model directory that it was compiled from.
        options: what to judge, where, and by which limits; None: the defaults of `CheckOptions`.
        say: gets the name of each check before it runs.

    Raises:
        DispcError: when the comparison cannot be made; nothing was judged then.
    """
    options = options or CheckOptions()
    older = read_report(options.baseline) if options.baseline else None
    comparison = Comparison(named_in_text(Path(artifact), ArtifactError), Path(reference), options)
    checks: list[Check] = []
    for row in CHECKS:
        if row.quick or not options.quick:
            say(row.name)
            checks += row.run(comparison)
    say("drilling down")
    drilled = find_fault(comparison, checks, always=options.drill)
    placement = None if options.quick else comparison.placement
    report = Report(
        **comparison.facts(),
        checks=tuple(checks),
        drill=drilled,
        perplexity=comparison.perplexities if options.data is not None else None,
        placement=placement.as_dict() if isinstance(placement, Placement) else None,
        latency=comparison.times,
        quick=options.quick,
        seed=options.seed,
    )
    return report if older is None else compare(report, older, options.max_regression)


def find_fault(comparison: Comparison, checks: Sequence[Check], *, always: bool) -> Drill | None:
    """Which sub-layer is wrong, where a check of parity failed; where none did, None unless `always`.

    Searched in the scenario that failed first, with widened weights where those are further over their limit: half
    precision may hide at each sub-layer what the logits show. Where no logits are over their limit (only the chosen
    tokens differ, or what failed has no streams), in the scenario with the largest error.
    """
    failed = any(not check.passed for check in checks if check.group == "parity")
    if not (failed or always):
        return None
    limit = comparison.options.thresholds.error
    passes = [comparison, *([comparison.widened] if failed and comparison.widened else [])]
    candidates = [
        (max(float(each.ratio.max()) for each in part.distances), part.run.scenario, judged)
        for judged in passes
        for part in judged.measured.values()
        if part.distances and part.run.scenario.streams and not part.run.noted
    ]
    over = [each for each in candidates if each[0] > limit]
    if over:
        *_, judged = max(over, key=lambda each: each[0])
        scenario = next(scenario for _, scenario, where in over if where is judged)
    elif failed and candidates:
        _, scenario, judged = max(candidates, key=lambda each: each[0])
    elif candidates:
        scenario, judged = PREFILL, comparison
    else:
        reason = next(check.detail for check in checks if not check.passed and check.group == "parity")
        return Drill(verdict=f"no drill: nothing could be run ({reason})", scenario="", limit=limit)
    return drill_down(judged, scenario, limit)
