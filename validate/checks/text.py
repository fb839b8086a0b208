"""Measurements that are made on request only: perplexity on a text, and times."""

from collections.abc import Iterator

from dispc.validate.checks.check import Check
from dispc.validate.checks.parity import judge_perplexities
from dispc.validate.comparison import Comparison


def judge_perplexity(comparison: Comparison) -> Iterator[Check]:
    """The artifact's perplexity against its reference's; noted beside them, that of the model not quantised.

    All are of what parity is judged on: all logits, no int8 activations, the weights as they are stored.
    """
    if comparison.options.data is None:
        return
    measured = comparison.perplexities
    limit = comparison.options.thresholds.perplexity
    yield judge_perplexities("perplexity", measured["artifact"], measured["reference"], limit)
    if "unquantised" in measured:
        yield judge_perplexities("cost of quantisation", measured["artifact"], measured["unquantised"], None)


def judge_latency(comparison: Comparison) -> Iterator[Check]:
    """Times of the artifact are noted, not judged: `--baseline` judges them."""
    times = comparison.times
    if times is None:
        return
    for row in times.rows:
        if row.artifact != "artifact":
            continue
        detail = f"p90 {row.p90:.2f}, p99 {row.p99:.2f} ms, {row.tokens_per_second:,.1f} tokens/s"
        if row.name in times.speedup:
            detail += f", {times.speedup[row.name]:.2f}x as fast as dense"
        if row.bytes_per_second is not None and row.share_of_copy is not None:
            detail += f", {row.bytes_per_second / 1e9:.1f} GB/s ({100 * row.share_of_copy:.0f} % of a copy)"
        yield Check.against(row.name, "latency", row.p50, None, "ms", detail)
