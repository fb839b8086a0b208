"""What the tests of learning share: a tiny model that speaks a tiny language, texts in it, and a run's options."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import harness
import language

from dispc.learn.options import LearnOptions
from dispc.learn.recovery_options import RecoverOptions


@cache
def student() -> Path:
    return language.make_student("llama", harness.scratch() / "student")


@cache
def text(name: str, words: int, seed: int) -> str:
    path = harness.scratch() / name
    path.write_text(language.make_text(words, seed))
    return str(path)


def run_options(**changes: Any) -> dict[str, Any]:
    """What a short run of learning or of recovery is told, as the fields of its options."""
    usual = dict(data=text("train.txt", 3000, 2), steps=12, sequence_length=32, batch_size=2, device="cpu")
    return usual | changes


def options(folder: Path, **changes: Any) -> LearnOptions:
    usual = dict(model=student(), output=folder / "masks.safetensors", learning_rate=1e-2, checkpoint_every=5)
    return LearnOptions(**run_options(**usual | changes))


def recover_options(folder: Path, masks: Path, **changes: Any) -> RecoverOptions:
    usual: dict[str, Any] = dict(model=student(), masks=masks, output=folder / "out", batch_size=4)
    usual |= dict(learning_rate=3e-3, evaluate_every=4, checkpoint_every=5)
    return RecoverOptions(**run_options(**usual | changes))


def command_line(command: str, **changes: Any) -> list[str]:
    """The words of a run of the student: `steps=8` becomes `--steps 8`."""
    words = [command, str(student())]
    for name, value in run_options(**changes).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def arguments(folder: Path, *more: str) -> list[str]:
    """The command line of a run of 12 steps of learning; `more` is added."""
    return [*command_line("learn", output=folder / "masks.safetensors", learning_rate=1e-2), *more]


def steps_of(metrics: Path) -> list[int]:
    """The steps in a `metrics.jsonl`."""
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
