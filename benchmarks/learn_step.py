"""What masking costs: a learning step against the dense model's forward pass and backward pass to its embeddings.

    .venv/bin/python benchmarks/learn_step.py ~/.cache/dispc/demo/SmolLM2-135M-Instruct \\
        --json benchmarks/results/learn_step.json

Both read the same batch, alternately, in one process. A learning step includes latents, gates, the forward and backward
pass of the gated model, the backward pass of the hypernetwork, and AdamW.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import console, report, summary, write_result
from machine import environment, load

from dispc.learn.budget import block_budget
from dispc.learn.distributed import Processes
from dispc.learn.objective import next_token_loss
from dispc.learn.options import LearnOptions
from dispc.learn.trainer import Trainer
from dispc.model.published import open_checkpoint
from dispc.reference.masked import load_reference
from dispc.runtime.timing import alternate
from dispc.support.dtypes import DTYPES

GOAL = 1.15


def synchronised(step: Callable[[], None], cuda: bool) -> Callable[[], None]:
    """The step and, on CUDA, a wait until the device has finished it."""

    def run() -> None:
        step()
        if cuda:
            torch.cuda.synchronize()

    return run


def main(
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory.")],
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 1,
    rounds: Annotated[int, typer.Option(help="Measured pairs.")] = 7,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [cuda where there is one].")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None,
) -> None:
    """Ratio of a learning step to the dense model's forward and backward pass."""
    checkpoint = open_checkpoint(model)
    processes = Processes.join(device)
    cuda = processes.device.type == "cuda"
    words, shape = checkpoint.config.vocab_size, (batch_size, sequence_length)
    rows = np.random.default_rng(0).integers(0, words, shape).astype(np.int32)
    ids = processes.share(rows)
    result: dict[str, Any] = {
        "benchmark": "learn_step",
        "environment": environment(),
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        options = LearnOptions(
            model=model,
            data="",
            output=Path(folder) / "masks.safetensors",
            sequence_length=sequence_length,
            batch_size=batch_size,
            device=processes.device.type,
        ).settled(processes.device)
        precision = str(options.precision)
        trainer = Trainer(options, checkpoint, block_budget(checkpoint, 0.5, "blocks"), processes, {})
        dense = load_reference(checkpoint, None, DTYPES[precision].torch)
        dense.requires_grad_(False).to(processes.device)

        def dense_step() -> None:
            with torch.autocast(processes.device.type, dtype=torch.bfloat16, enabled=cuda):
                embedded = dense.get_input_embeddings()(ids).detach().requires_grad_()
                logits = dense(inputs_embeds=embedded, use_cache=False).logits
            next_token_loss(logits, ids).backward()  # type: ignore[no-untyped-call]

        def learning_step() -> None:
            trainer.advance(rows)

        runs = {"dense": synchronised(dense_step, cuda), "learning": synchronised(learning_step, cuda)}
        times = alternate(runs, rounds, warmup_calls=0)
    seconds = {name: [value / 1000 for value in values] for name, values in times.items()}
    result["load_after"] = load()
    pairs = [b / a for a, b in zip(seconds["dense"], seconds["learning"], strict=True)]
    ratio = statistics.median(pairs)
    result |= {
        "model": model.name,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "precision": precision,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "ratio": round(ratio, 4),
        "ratio_of_pairs": summary(pairs),
        **{name: summary(values) for name, values in seconds.items()},
    }
    goal = f"a learning step takes {ratio:.2f} times the dense pass (goal {GOAL:.2f})"
    result["goals"] = {goal: ratio <= GOAL}
    table = [[name, f"{statistics.median(values):.3f}"] for name, values in seconds.items()]
    report(f"{model.name}, {batch_size} x {sequence_length} tokens", ("step", "seconds"), table, result["goals"])
    console.print(f"ratio of pairs: {min(pairs):.2f} to {max(pairs):.2f}", highlight=False)
    write_result(json_file, result)


if __name__ == "__main__":
    typer.run(main)
