"""Options of a recovery run."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from dispc.learn.options import RunOptions, check_least, check_one_of
from dispc.manifest import COPIED, LICENCE_FILES
from dispc.support.directories import check_output
from dispc.support.errors import LearnError

LossName = Literal["distil", "text", "both"]
LOSSES: dict[LossName, tuple[float, float]] = {"distil": (1.0, 0.0), "text": (0.0, 1.0), "both": (0.5, 0.5)}
"""Weights of the divergence from the teacher and of the text's own cross entropy."""
MARKER = "recovery.json"
"""The file by which a recovered directory is known."""
WRITTEN = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|masks\.safetensors|README\.md|adapter"
)
"""What a recovered model holds, beside its marker and the files in COPIED."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
FULL_RATE, LORA_RATE = 1e-4, 1e-3


@dataclass(frozen=True, kw_only=True)
class RecoverOptions(RunOptions):
    """Options of `dispc recover`; `output` is the model directory that is made, the run's folder stands beside it.

    `lora` is the rank of the adapters; 0 trains all weights of the blocks. `teacher` None is the model itself, dense.
    `patience` counts judgements without a gain.
    """

    CHANGEABLE: ClassVar = (*RunOptions.CHANGEABLE, "masks", "teacher", "held_out")

    masks: Path
    teacher: Path | None = None
    held_out: str | None = None
    loss: LossName = "both"
    lora: int = 0
    steps: int = 1000
    sequence_length: int = 512
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = FULL_RATE
    warm_up: float = 0.05
    weight_decay: float = 0.01
    evaluate_every: int = 50
    patience: int = 10
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("loss", self.loss, get_args(LossName))
        check_least(
            lora=(self.lora, 0),
            accumulate=(self.accumulate, 1),
            evaluate_every=(self.evaluate_every, 1),
            patience=(self.patience, 1),
        )
        if not 0.0 <= self.warm_up < 1.0:
            raise LearnError(f"warm_up is {self.warm_up}; it must be a share of the steps, at least 0, below 1")

    @property
    def folder(self) -> Path:
        """`recovered.recover` beside `recovered/`."""
        return self.output.with_name(f"{self.output.name}.recover")

    @property
    def sequences(self) -> int:
        return self.batch_size * self.accumulate

    @property
    def falling(self) -> bool:
        return True

    def check_output(self, *, force: bool) -> None:
        check_output(self.output, force, MARKER, foreign_to_recovered)

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate of step number `step`, counted from 0: rising for a share `warm_up`, then half a cosine."""
        done = max(self.done(step, seconds), 1.0 / self.steps)  # the first step moves too
        if done < self.warm_up:
            return self.learning_rate * done / self.warm_up
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (done - self.warm_up) / (1.0 - self.warm_up)))


def foreign_to_recovered(directory: Path) -> str | None:
    """What in a directory is not of a recovered model that dispc wrote; None where there is nothing like that."""
    for path in sorted(directory.iterdir()):
        known = path.name in (MARKER, *COPIED) or WRITTEN.fullmatch(path.name) or LICENCE_FILES.fullmatch(path.name)
        folder = path.is_dir() and not path.is_symlink()
        inside = {file.name for file in path.iterdir()} if folder else set()
        if not known or folder != (path.name == "adapter") or not inside <= set(ADAPTER_FILES):
            return f"holds {path.name}, which is not of the recovered model"
    return None
