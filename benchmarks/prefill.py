"""Milliseconds per prefill on the CPU: half pruned against dense, and what the floating-point operations allow.

    .venv/bin/python benchmarks/prefill.py --model SMOLLM2_DIR \\
        --builder-python OTHER_VENV/bin/python --json benchmarks/results/prefill.json

    .venv/bin/python benchmarks/prefill.py --model SMOLLM2_DIR --last-logits --builder-python ...

The rows are those of cpu_decode.py. One call is a prefill of `length` tokens, with the logits of every position, or
with --last-logits of the last one: the time to the first token. Operations are counted from the widths: two for each
weight of the projections and of the LM head and each token; four for each head, feature and pair of positions of causal
attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import comparison
import numpy as np
import typer
from common import numbers
from comparison import Measurement, Work, compare
from contenders import Contender, Contenders

from dispc.cli.arguments import expand
from dispc.masks import Masks
from dispc.model.config import DecoderConfig

GOALS = {128: 0.92, 512: 0.92, 2048: 0.95}
"""Share of the ratio of operations that the speed-up must reach, by tokens."""
LAST_GOAL = 0.92
"""The same with --last-logits, and for other lengths."""
OPERATIONS = Work(name="operations", key="operations", unit="Gflop", scale=1e9, rate="Gflop/s")


@dataclass(frozen=True, kw_only=True)
class Options(comparison.Options):
    """The command line."""

    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 5
    calls: Annotated[int, typer.Option(help="Counted prompts per round and row.")] = 1
    lengths: Annotated[str, typer.Option(help="Tokens per prompt.")] = "128,512,2048"
    last_logits: Annotated[bool, typer.Option("--last-logits", help="Only the last token's logits.")] = False


def start(model: Contender, length: int) -> Callable[[], None]:
    """A prefill of `length` random tokens."""
    model.allocate(1, length)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length))
    return model.bind(ids, 0).run


def operations(config: DecoderConfig, masks: Masks, length: int, last_logits: bool) -> int:
    """Floating-point operations of a prefill of `length` tokens, without those of norms and activations."""
    head = config.vocab_size * config.hidden_size * (1 if last_logits else length)
    attentions = masks.cache_layers
    pairs = length * (length + 1) // 2
    return 2 * (masks.kept_parameters(config) * length + head) + 4 * attentions * config.query_size * pairs


def count(last_logits: bool, contenders: Contenders, name: str, length: int) -> int:
    """Operations of a contender's prefill; the dense contenders have the same."""
    config = contenders.checkpoint.config
    masks = Masks.dense(config) if name in contenders.dense else contenders.masks
    return operations(config, masks, length, last_logits)


def goal(last_logits: bool, length: int) -> float:
    return LAST_GOAL if last_logits else GOALS.get(length, LAST_GOAL)


def main(options: Options) -> None:
    """Prefill on the CPU: half pruned against dense."""
    if options.smoke:
        options = replace(options, lengths="8,32", rounds=1, calls=1)
    prompts = Measurement(
        benchmark="prefill",
        title="time to the first token" if options.last_logits else "prefill",
        size="length",
        work=OPERATIONS,
        start=start,
        count=partial(count, options.last_logits),
        goal=partial(goal, options.last_logits),
        warmup_calls=0,  # a call is long enough to warm itself up
        keep_up_with_builder=False,
        last_logits=options.last_logits,
    )
    compare(prompts, options, numbers(options.lengths))


if __name__ == "__main__":
    typer.run(expand(main))
