"""The same artifact run another way: as it is shipped, twice, and with its weights widened to float32."""

from collections.abc import Iterator

import numpy as np

from dispc.runtime.session import Artifact
from dispc.support.arrays import Array
from dispc.support.errors import ArtifactError
from dispc.validate.checks.check import Check
from dispc.validate.checks.parity import LIMITS, judge_logits, logit_error
from dispc.validate.client import Client
from dispc.validate.comparison import Comparison

INT8_ACTIVATIONS_LIMIT = 0.1
"""Share of the logits' range that rounding activations to int8 may cost the last token (docs/quantisation.md)."""
SHIPPED_BATCHES, SHIPPED_STEPS = ((17, 5, 9, 1, 3, 12, 16, 2, 8), (300,)), 4
"""Lengths of the prompts of each batch, where the model is as long; and steps after them."""


def judge_shipped(comparison: Comparison) -> Iterator[Check]:
    """The artifact as it is against the graph that the other checks ran (`Artifact`, exact): each row's last token.

    A prefill of each of SHIPPED_BATCHES, and SHIPPED_STEPS steps after it.
    """
    exact, client = comparison.artifact, comparison.client
    if not (exact.last_logits or exact.int8_activations):
        return
    shipped = Artifact(comparison.directory, provider=exact.provider)
    longest = exact.positions - SHIPPED_STEPS
    batches = [
        [client.tokens(100 + length, min(length, longest)).tolist() for length in lengths]
        for lengths in SHIPPED_BATCHES
    ]
    named = (("int8 activations", exact.int8_activations), ("last logits", exact.last_logits))
    what = [name for name, has in named if has]
    error = 0.0
    try:
        for tokens in batches:
            (found, ours), (expected, theirs) = shipped.prefill(tokens), exact.prefill(tokens)
            error = max(error, logit_error(found, expected))
            for _ in range(SHIPPED_STEPS):
                chosen = expected.argmax(axis=-1)
                (found, ours), (expected, theirs) = shipped.step(chosen, ours), exact.step(chosen, theirs)
                error = max(error, logit_error(found, expected))
    except ArtifactError as reason:
        yield Check.failed(", ".join(what), "parity", str(reason))
        return
    limit = INT8_ACTIVATIONS_LIMIT if exact.int8_activations else LIMITS[exact.dtype]
    prompts = sum(map(len, batches))
    detail = f"{prompts} prompts and {SHIPPED_STEPS} steps, last tokens; the other checks are of the graph without"
    yield Check.against(", ".join(what), "parity", error, limit, "of the range", f"{detail} {' and '.join(what)}")


def judge_bits(comparison: Comparison) -> Iterator[Check]:
    """The same prompt, and a step after it, run twice, gives the same bits."""
    yield same_bits(comparison.client)


def same_bits(client: Client) -> Check:
    runs: list[Array] = []
    try:
        for _ in range(2):
            (row,) = client.batch([client.text]).prefill([client.length - 1]).extend().outputs()
            runs.append(row.outputs["logits"])
    except ArtifactError as error:
        return Check.failed("same bits", "parity", str(error))
    differing = float((runs[0].view(np.uint32) != runs[1].view(np.uint32)).sum())
    return Check.against("same bits", "parity", differing, 0.0, "numbers that differ", "the same prompt and step twice")


def judge_widened(comparison: Comparison) -> Iterator[Check]:
    """Half precision hides what float32 shows: the quick scenarios with the weights widened, on the CPU.

    They are held to float32's own error. Skipped where that is how everything is judged.
    """
    widened = comparison.widened
    if comparison.artifact.dtype == "float32":
        return
    if widened is None:
        yield Check.skipped("weights widened", "parity", "the other checks widened them")
        return
    for name, measured in widened.measured.items():
        title, limit = f"{name}, weights widened", comparison.options.thresholds.error
        if measured.run.check is not None:
            yield Check.failed(title, "parity", measured.run.check.detail)
        else:
            yield judge_logits(title, measured.run.rows, measured.distances, measured.run.detail, limit)
