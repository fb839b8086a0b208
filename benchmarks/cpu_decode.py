"""Milliseconds per decoding step on the CPU, batch 1: half pruned against dense, and what the bytes allow.

    .venv/bin/python benchmarks/cpu_decode.py --model SMOLLM2_DIR \\
        --builder-python OTHER_VENV/bin/python --json benchmarks/results/cpu_decode.json
    .venv/bin/python benchmarks/cpu_decode.py --shape 7b-4 --builder-python OTHER_VENV/bin/python
    .venv/bin/python benchmarks/cpu_decode.py --model SMOLLM2_DIR --quantize int4 --builder-python ...
    .venv/bin/python benchmarks/cpu_decode.py --model SMOLLM2_DIR --lowering canonical

SMOLLM2_DIR is a Hugging Face directory of SmolLM2-135M; `7b-4` is four blocks of LLaMA-2-7B with random weights, and
needs about 16 GB of memory; OTHER_VENV has transformers 5 and onnxruntime-genai, which the builder needs. The rows run
in one process with the same session options and threads; the graphs are timed alternately, PyTorch after them:

- builder, dense: the graph of `python -m onnxruntime_genai.models.builder -p fp32 -e cpu` (int4 with --quantize)
- dispc, dense and dispc, pruned: `dispc compile` for onnx-cpu
- PyTorch, pruned: the paper's Algorithm 1 (float32 only)

One call is one decoding step with `past` tokens in the caches, always the same step; sampling is not part of it.
Speed-up is over the faster dense graph. Bytes are what a step reads: the weights, one row of the embedding, the caches.
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

GOALS = {"small": {64: 0.97, 512: 0.95}, "7b-4": {64: 0.97, 512: 0.97}, "int4": {64: 0.90, 512: 0.90}}
"""Share of the ratio of bytes that the speed-up must reach, by model and by tokens in the caches."""
BYTES = Work(name="bytes", key="bytes_read", unit="MB read", scale=1e6, rate="GB/s")


@dataclass(frozen=True, kw_only=True)
class Options(comparison.Options):
    """The command line."""

    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 9
    calls: Annotated[int, typer.Option(help="Counted tokens per round and row.")] = 16
    quantize: Annotated[str | None, typer.Option(help="int4: both sides with 4-bit weights.")] = None
    pasts: Annotated[str, typer.Option(help="Numbers of tokens in the caches.")] = "64,512"


def start(model: Contender, past: int) -> Callable[[], None]:
    """A decoding step with `past` tokens in the caches."""
    model.allocate(1, past + 1)
    return model.bind(np.array([[7]]), past).run


def bytes_read(contenders: Contenders, name: str, past: int) -> int:
    """Bytes that a step of a contender reads."""
    return contenders.models[name].bytes_read(1, past)


def goal(kind: str, past: int) -> float:
    return GOALS[kind].get(past, min(GOALS[kind].values()))


def main(options: Options) -> None:
    """Decoding on the CPU: half pruned against dense."""
    if options.smoke:
        options = replace(options, pasts="8,16", rounds=1, calls=2)
    kind = "int4" if options.quantize else "7b-4" if options.shape == "7b-4" else "small"
    decoding = Measurement(
        benchmark="cpu_decode",
        title=options.quantize or "float32",
        size="past",
        work=BYTES,
        start=start,
        count=bytes_read,
        goal=partial(goal, kind),
        warmup_calls=2,
        keep_up_with_builder=True,
        quantize=options.quantize,
    )
    compare(decoding, options, numbers(options.pasts))


if __name__ == "__main__":
    typer.run(expand(main))
