"""Prefill on the CPU: the speed-up of a half pruned model against what the floating-point operations would allow.

    .venv/bin/python benchmarks/prefill.py --model SMOLLM2_DIR \\
        --builder-python OTHER_VENV/bin/python --json benchmarks/results/prefill.json

    .venv/bin/python benchmarks/prefill.py --model SMOLLM2_DIR --last-logits --builder-python ...

Rows as in cpu_decode.py, with the same options for all; one call is one prompt of `length` tokens in one run, with the
logits of every position, or with --last-logits of the last one: the time to the first token. Operations are counted
from the widths: two per weight and token of the projections and of the LM head, and four per head, feature and pair of
positions for the attention, which is causal.
"""

import statistics
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import WORK, alternate, median_ratio, remove, report, summary, write_result
from contenders import (
    PRUNED,
    BuilderOption,
    Contenders,
    LoweringOption,
    MasksOption,
    ModelOption,
    ShapeOption,
    begin,
)
from machine import load

from dispc.masks import Masks
from dispc.model.families import DecoderConfig

GOALS = {128: 0.92, 512: 0.92, 2048: 0.95}
"""Share of the operations' ratio, by tokens."""
LAST_GOAL = 0.92


def operations(config: DecoderConfig, masks: Masks, length: int, last_logits: bool) -> int:
    """Floating-point operations of a prompt of `length` tokens. What norms and activations add is left out."""
    head = config.vocab_size * config.hidden_size * (1 if last_logits else length)
    attentions = sum(block.attention.alive for block in masks.blocks)
    pairs = length * (length + 1) // 2
    return 2 * (masks.kept_parameters(config) * length + head) + 4 * attentions * config.query_size * pairs


def measure(contenders: Contenders, length: int, rounds: int, calls: int, last_logits: bool) -> dict[str, Any]:
    """Everything about prompts of `length` tokens."""
    config = contenders.checkpoint.config
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
    runs = {}
    for name, model in contenders.models.items():
        model.allocate(1, length)
        runs[name] = model.bind(ids, 0).run
    times = alternate(runs, rounds, calls, warm=0)  # a call is long enough to warm itself up
    dense, pruned = (
        operations(config, masks, length, last_logits) for masks in (Masks.dense(config), contenders.masks)
    )
    goal = LAST_GOAL if last_logits else GOALS.get(length, LAST_GOAL)
    fastest = min(contenders.dense, key=lambda name: statistics.median(times[name]))
    found: dict[str, Any] = {"fastest_dense": fastest, "operations_ratio": round(dense / pruned, 3)}
    for name, values in times.items():
        found[name] = {
            "milliseconds": summary(values),
            "operations": dense if name in contenders.dense else pruned,
            "speedup": round(median_ratio(times[fastest], values), 3),
        }
    share = found["speedup_over_operations_ratio"] = round(found[PRUNED]["speedup"] * pruned / dense, 3)
    said = (
        f"{length} tokens: {found[PRUNED]['speedup']:.2f} times as fast as {fastest}, {share:.2f} of the operations' "
    )
    return found | {"goals": {f"{said}{dense / pruned:.2f} (goal {goal:.2f})": share >= goal}}


def main(
    model: ModelOption = None,
    shape: ShapeOption = None,
    masks: MasksOption = None,
    lowering: LoweringOption = None,
    builder_python: BuilderOption = None,
    lengths: Annotated[str, typer.Option(help="Tokens per prompt.")] = "128,512,2048",
    last_logits: Annotated[bool, typer.Option("--last-logits", help="Only the last token's logits.")] = False,
    threads: Annotated[int, typer.Option(help="Threads within a node, of ONNX Runtime and of PyTorch.")] = 2,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 5,
    calls: Annotated[int, typer.Option(help="Counted prompts per round and row.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for what is written.")] = WORK / "prefill",
    smoke: Annotated[bool, typer.Option(help="Tiny model, one round: does it run?")] = False,
) -> None:
    """Prefill on the CPU: half pruned against dense."""
    if smoke:
        lengths, rounds, calls = "8,32", 1, 1
    result, contenders = begin(
        "prefill", model=model, shape=shape, masks=masks, lowering=lowering, builder_python=builder_python,
        threads=threads, rounds=rounds, calls=calls, work=work, smoke=smoke,
        last_logits=last_logits,
    )  # fmt: skip
    result["last_logits"] = last_logits
    rows, goals = [], {}
    for length in (int(length) for length in lengths.split(",")):
        found = result[f"length_{length}"] = measure(contenders, length, rounds, calls, last_logits)
        goals |= found["goals"]
        for name in contenders.models:
            row = found[name]
            milliseconds = [f"{row['milliseconds'][key]:.1f}" for key in ("median", "min", "max")]
            rate = row["operations"] / row["milliseconds"]["median"] / 10**6
            rows.append(
                [
                    name,
                    str(length),
                    *milliseconds,
                    f"{row['speedup']:.2f}",
                    f"{row['operations'] / 1e9:.1f}",
                    f"{rate:.0f}",
                ]
            )
    result["load_after"] = load()
    del contenders
    remove(work)
    result["goals"] = {} if smoke else goals
    columns = ("", "tokens", "median ms", "min ms", "max ms", "speed-up", "Gflop", "Gflop/s")
    kind = "time to the first token" if last_logits else "prefill"
    what = f"{result['model']}, {kind}, {result['lowering']}, {100 * result['kept']:.1f} % kept"
    report(f"{what}, {threads} threads, {rounds} rounds", columns, rows, result["goals"])
    write_result(json_file, result)


if __name__ == "__main__":
    typer.run(main)
