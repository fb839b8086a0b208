"""Every check of `dispc validate`: a row for each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dispc.validate.checks import (
    embeddings,
    facts,
    files,
    graph,
    parity,
    placement,
    rotary,
    static,
    text,
    variants,
    weights,
)
from dispc.validate.checks.check import Check
from dispc.validate.checks.scenarios import GREEDY, SCENARIOS, Scenario
from dispc.validate.comparison import Comparison


@dataclass(frozen=True)
class CheckRow:
    """A group of checks: `name` is printed while it runs, reports list the checks that `run` yields (none where it was
    not asked for).

    `quick` ones run at the end of every compilation too. Every stored validation has those that are `always` given. The
    embeddings load the artifact a second time, so they come before the scenarios, whose logits are kept.
    """

    name: str
    run: Callable[[Comparison], Iterator[Check]]
    quick: bool = False
    always: bool = True


def judge_scenario(scenario: Scenario) -> Callable[[Comparison], Iterator[Check]]:
    """The logits of a scenario; of the greedy one the chosen tokens as well."""

    def run(comparison: Comparison) -> Iterator[Check]:
        measured, limits = comparison.measured[scenario.name], comparison.options.thresholds
        if measured.run.check is not None:
            yield measured.run.check
            return
        name = "greedy logits" if scenario is GREEDY else scenario.name
        limit = None if measured.run.noted else limits.error
        yield parity.judge_logits(name, measured.run.rows, measured.distances, measured.run.detail, limit)
        if scenario is GREEDY:  # after the last step nothing was chosen
            steps = [each.part(slice(0, -1)) for each in measured.distances]
            yield parity.judge_choices(scenario.name, steps, measured.run.detail, limits.error, limits.greedy)

    return run


def judge_divergence(comparison: Comparison) -> Iterator[Check]:
    if comparison.judged:
        yield parity.judge_divergence(comparison.judged, comparison.options.thresholds.kl)


def judge_top1(comparison: Comparison) -> Iterator[Check]:
    limits = comparison.options.thresholds
    if comparison.judged:
        yield parity.judge_choices("top-1 tokens", comparison.judged, "all scenarios", limits.error, limits.top1)


def judge_facts(comparison: Comparison) -> Iterator[Check]:
    yield from facts.judge_facts(comparison, {row.name for row in CHECKS if row.quick and row.always})


CHECKS: tuple[CheckRow, ...] = (
    CheckRow("onnx.checker", static.judge_file),
    CheckRow(static.INTERFACE, static.judge_interface),
    CheckRow("masks", files.judge_masks),
    CheckRow("files beside the model", files.judge_companions),
    CheckRow("dispc.json", judge_facts),
    CheckRow(graph.NAME, graph.judge_graph),
    CheckRow(weights.NAME, weights.judge_weights),
    CheckRow("embeddings", embeddings.judge_embeddings, quick=True),
    CheckRow("rotary tables", rotary.judge_rotary, quick=True),
    *(CheckRow(scenario.name, judge_scenario(scenario), scenario.quick) for scenario in SCENARIOS),
    CheckRow("KL divergence", judge_divergence, quick=True),
    CheckRow("top-1 tokens", judge_top1, quick=True),
    CheckRow("as shipped", variants.judge_shipped, quick=True, always=False),
    CheckRow("same bits", variants.judge_bits),
    CheckRow("weights widened", variants.judge_widened),
    CheckRow("placement", placement.judge_placement),
    CheckRow("perplexity", text.judge_perplexity),
    CheckRow("latency", text.judge_latency),
)
