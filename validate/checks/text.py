"""Measurements that are made on request only: perplexity on a text, and times."""

from collections.abc import Iterator

from dispc.runtime.latency import judge_latency as judge_times
from dispc.support.check import Check
from dispc.validate.checks.parity import judge_perplexities
from dispc.validate.comparison import Comparison


def judge_perplexity(comparison: Comparison) -> Iterator[Check]:
    """The artifact's perplexity against its reference's; noted beside them, that of the model not quantised.

    All are of what parity is judged on: all logits, no int8 activations, the weights as they are stored.
    """
    if comparison.options.data is None:
        return
    found = comparison.perplexities
    limit = comparison.options.thresholds.perplexity
    yield judge_perplexities("perplexity", found["artifact"], found["reference"], limit)
    if "unquantised" in found:
        yield judge_perplexities("cost of quantisation", found["artifact"], found["unquantised"], None)


def judge_latency(comparison: Comparison) -> Iterator[Check]:
    """Times are noted, not judged: `--baseline` judges them."""
    if comparison.times is not None:
        yield from judge_times(comparison.times)
