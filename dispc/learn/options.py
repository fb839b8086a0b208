"""What a learning run is asked for. The defaults are the paper's."""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from dispc.learn.budget import RatioOf
from dispc.learn.estimator import OFFSET, EstimatorName
from dispc.masks import NormScope
from dispc.support.errors import LearnError

Precision = Literal["float32", "bfloat16"]
LARGE = 1e6
"""No rate or weight is this large but by mistake, and float32 would overflow not far above."""
CHANGEABLE = (
    "model", "data", "steps", "output", "device", "checkpoint_every", "tensorboard", "activation_checkpointing",
    "compile", "align", "learning_rate",
)  # fmt: skip
"""Options that may differ when a run is resumed.

They do not change what a step computes (but `steps` with `decay`), or mend a run that went wrong: the learning rate
where the loss is no number, the alignment where the final sets miss the budget. Of model and data the content must be
the same, which the checkpoint knows, and not the path.
"""


def check_choices(*, ratio_of: str, norm_scope: str, align: int, sequence_length: int, seed: int) -> None:
    """Raise LearnError naming the first of the choices that every method has which is none."""
    for name, value, kind in (("ratio_of", ratio_of, RatioOf), ("norm_scope", norm_scope, NormScope)):
        if value not in get_args(kind):
            raise LearnError(f"{name} is {value!r}; choose one of {', '.join(get_args(kind))}")
    for name, number, least in (("align", align, 1), ("sequence_length", sequence_length, 2), ("seed", seed, 0)):
        if number < least:
            raise LearnError(f"{name} is {number}; it must be at least {least}")
    if seed >= 2**64:
        raise LearnError(f"seed is {seed}; it must be below 2**64")


@dataclass(frozen=True, kw_only=True)
class LearnOptions:
    """Options of `dispc learn`; `output` is the mask file, the run's folder stands beside it."""

    model: Path
    data: str
    output: Path
    pruning_ratio: float = 0.5
    ratio_of: RatioOf = "blocks"
    steps: int = 10_000
    sequence_length: int = 2048
    batch_size: int = 1
    learning_rate: float = 1e-3
    decay: bool = False
    weight_decay: float = 0.05
    regulariser_weight: float = 6.0
    estimator: EstimatorName = "reinmax"
    offset: float = OFFSET
    hypernetwork: bool = True
    gru: bool = True
    constrained: bool = False
    norm_scope: NormScope = "full"
    align: int = 1
    seed: int = 0
    device: str | None = None
    precision: Precision | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    checkpoint_every: int = 200
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_choices(
            ratio_of=self.ratio_of, norm_scope=self.norm_scope, align=self.align, seed=self.seed,
            sequence_length=self.sequence_length,
        )  # fmt: skip
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise LearnError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not math.isfinite(self.offset):
            raise LearnError(f"offset is {self.offset}; it must be a number")
        if not 0.0 < self.learning_rate < LARGE:
            raise LearnError(f"learning_rate is {self.learning_rate}; it must be a number above 0, below {LARGE:g}")
        for name in ("weight_decay", "regulariser_weight"):
            if not 0.0 <= getattr(self, name) < LARGE:
                raise LearnError(f"{name} is {getattr(self, name)}; it must be a number, at least 0, below {LARGE:g}")
        if self.estimator not in get_args(EstimatorName):
            raise LearnError(f"estimator is {self.estimator!r}; choose one of {', '.join(get_args(EstimatorName))}")
        if self.precision not in (None, *get_args(Precision)):
            raise LearnError(f"precision is {self.precision!r}; choose one of {', '.join(get_args(Precision))}")
        if not self.hypernetwork and not self.gru:
            raise LearnError("--no-gru changes the hypernetwork, which --no-hypernetwork leaves out; give one of them")

    @property
    def folder(self) -> Path:
        """The run's folder: checkpoint, options, metrics and plots; `masks.learn` beside `masks.safetensors`."""
        return self.output.with_name(f"{self.output.name.removesuffix('.safetensors')}.learn")

    @property
    def method(self) -> str:
        """What the mask file calls this run's method."""
        parts = ["disp-llm", self.estimator]
        parts += [] if self.hypernetwork else ["no-hypernetwork"]
        parts += [] if self.gru else ["no-gru"]
        parts += ["constrained"] if self.constrained else []
        return " ".join(parts)

    def settled(self, device: torch.device) -> "LearnOptions":
        """The same with the precision that a run on `device` has unless told: bfloat16 on CUDA, float32 elsewhere."""
        default: Precision = "bfloat16" if device.type == "cuda" else "float32"
        return replace(self, precision=self.precision or default)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the run's options.json."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def rate(self, step: int) -> float:
        """The learning rate of step number `step`, counted from 0: constant, or falling linearly to zero."""
        return self.learning_rate * (1.0 - step / self.steps if self.decay else 1.0)

    def check_same(self, recorded: dict[str, Any]) -> None:
        """Raise LearnError naming the first option in which a recorded run differs from this one."""
        for name, value in self.as_dict().items():
            changeable = name in CHANGEABLE and not (name == "steps" and self.decay)
            then = recorded.get(name, DEFAULTS.get(name))
            if not changeable and then != value:
                raise LearnError(
                    f"{self.folder}: that run has {name}={then}, this one {value}; "
                    "resume with the same options, or start anew with --force"
                )


DEFAULTS = {field.name: field.default for field in fields(LearnOptions)}
"""What an option was in runs from before it existed."""
