"""What the tests of learning share: a tiny model that speaks a tiny language, texts in it, and a run's options."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import harness
import language

from dispc.learn.options import LearnOptions


@cache
def student() -> Path:
    return language.make_student("llama", harness.scratch() / "student")


@cache
def text(name: str, words: int, seed: int) -> str:
    path = harness.scratch() / name
    path.write_text(language.make_text(words, seed))
    return str(path)


def options(folder: Path, **changes: Any) -> LearnOptions:
    defaults: dict[str, Any] = dict(
        model=student(),
        data=text("train.txt", 3000, 2),
        output=folder / "masks.safetensors",
        steps=12,
        sequence_length=32,
        batch_size=2,
        learning_rate=1e-2,
        checkpoint_every=5,
        device="cpu",
    )
    return LearnOptions(**defaults | changes)


def arguments(folder: Path, *more: str) -> list[str]:
    """The command line of a run of 12 steps; `more` is added."""
    return [
        "learn",
        str(student()),
        "--data",
        text("train.txt", 3000, 2),
        "-o",
        str(folder / "masks.safetensors"),
        "--steps",
        "12",
        "--sequence-length",
        "32",
        "--batch-size",
        "2",
        "--learning-rate",
        "1e-2",
        "--device",
        "cpu",
        *more,
    ]


def steps_of(metrics: Path) -> list[int]:
    """The steps in a `metrics.jsonl`."""
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
