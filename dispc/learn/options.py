"""Options of runs: those that learning and recovery share, and those of learning, whose defaults are the paper's."""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch

from dispc.learn.budget import RatioOf
from dispc.learn.estimator import OFFSET, EstimatorName
from dispc.masks import NormScope, check_mask_output
from dispc.support.errors import LearnError

Precision = Literal["float32", "bfloat16"]
LARGE = 1e6
"""Larger rates and weights are mistakes; float32 overflows not far above."""


def check_choices(*, ratio_of: str, norm_scope: str, align: int, sequence_length: int, seed: int) -> None:
    """Raise LearnError naming the first unusable value of the options that every method of choosing masks has."""
    for name, value, kind in (("ratio_of", ratio_of, RatioOf), ("norm_scope", norm_scope, NormScope)):
        check_one_of(name, value, get_args(kind))
    check_least(align=(align, 1), sequence_length=(sequence_length, 2), seed=(seed, 0))
    if seed >= 2**64:
        raise LearnError(f"seed is {seed}; it must be below 2**64")


def check_one_of(name: str, value: object, choices: tuple[Any, ...]) -> None:
    """Raise LearnError unless `value` is one of the choices."""
    if value not in choices:
        raise LearnError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}")


def check_least(**options: tuple[int, int]) -> None:
    """Raise LearnError naming the first option, given as (value, least), that is too small."""
    for name, (number, least) in options.items():
        if number < least:
            raise LearnError(f"{name} is {number}; it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of every run that takes steps through a text.

    `minutes` ends a run early: what it has by then is written. `output` is what the run makes.
    """

    CHANGEABLE: ClassVar[tuple[str, ...]] = (
        "model",
        "data",
        "steps",
        "minutes",
        "output",
        "device",
        "checkpoint_every",
        "activation_checkpointing",
        "learning_rate",
    )
    """Options that may differ when a run is resumed.

    They do not change what a step computes (`steps` and `minutes` do where the rate falls); the learning rate may
    change to repair a run whose loss is no number. Model and data may move, but their content must match the
    checkpoint's digests.
    """

    model: Path
    data: str
    output: Path
    steps: int
    minutes: float | None = None
    sequence_length: int
    batch_size: int = 1
    learning_rate: float
    weight_decay: float
    seed: int = 0
    device: str | None = None
    precision: Precision | None = None
    activation_checkpointing: bool = False
    checkpoint_every: int

    def __post_init__(self) -> None:
        check_least(
            steps=(self.steps, 1),
            batch_size=(self.batch_size, 1),
            checkpoint_every=(self.checkpoint_every, 1),
            sequence_length=(self.sequence_length, 2),
            seed=(self.seed, 0),
        )
        if self.minutes is not None and not 0.0 < self.minutes < LARGE:
            raise LearnError(f"minutes is {self.minutes}; it must be a number above 0")
        if not 0.0 < self.learning_rate < LARGE:
            raise LearnError(f"learning_rate is {self.learning_rate}; it must be a number above 0, below {LARGE:g}")
        self._check_weights("weight_decay")
        if self.precision is not None:
            check_one_of("precision", self.precision, get_args(Precision))

    def _check_weights(self, *names: str) -> None:
        for name in names:
            if not 0.0 <= getattr(self, name) < LARGE:
                raise LearnError(f"{name} is {getattr(self, name)}; it must be a number, at least 0, below {LARGE:g}")

    @property
    def folder(self) -> Path:
        """The run's folder: checkpoint, options, metrics and plots."""
        raise NotImplementedError

    @property
    def sequences(self) -> int:
        """How many sequences a step reads."""
        return self.batch_size

    @property
    def falling(self) -> bool:
        """Whether the learning rate depends on how much of the run is done."""
        raise NotImplementedError

    def check_output(self, *, force: bool) -> None:
        """Raise DispcError unless `output` may be written, in place of an older one only with `force`."""
        raise NotImplementedError

    def settled(self, device: torch.device) -> Self:
        """The same with the precision that a run on `device` has by default: bfloat16 on CUDA, float32 elsewhere."""
        default: Precision = "bfloat16" if device.type == "cuda" else "float32"
        return replace(self, precision=self.precision or default)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the run's options.json."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def done(self, step: int, seconds: float) -> float:
        """The share of the run, 0 to 1, that is done after `step` steps and so many seconds in all of them."""
        share = step / self.steps
        return share if self.minutes is None else min(1.0, max(share, seconds / (60.0 * self.minutes)))

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate of step number `step`, counted from 0, after so many seconds in all steps before it."""
        raise NotImplementedError

    def check_same(self, recorded: dict[str, Any]) -> None:
        """Raise LearnError naming the first option in which a recorded run differs from this one."""
        defaults = {field.name: field.default for field in fields(self)}  # for runs from before an option existed
        for name, value in self.as_dict().items():
            changeable = name in self.CHANGEABLE and not (name in ("steps", "minutes") and self.falling)
            then = recorded.get(name, defaults.get(name))
            if not changeable and then != value:
                raise LearnError(
                    f"{self.folder}: that run has {name}={then}, this one {value}; "
                    "resume with the same options, or start anew with --force"
                )


@dataclass(frozen=True, kw_only=True)
class LearnOptions(RunOptions):
    """Options of `dispc learn`; `output` is the mask file, the run's folder stands beside it.

    `start_from` names the instant method whose ranking the latents begin with; None: all begin equal.
    """

    CHANGEABLE = (*RunOptions.CHANGEABLE, "tensorboard", "compile", "align")  # align: where final sets miss the budget

    pruning_ratio: float = 0.5
    ratio_of: RatioOf = "blocks"
    steps: int = 10_000
    sequence_length: int = 2048
    learning_rate: float = 1e-3
    decay: bool = False
    weight_decay: float = 0.05
    regulariser_weight: float = 6.0
    estimator: EstimatorName = "reinmax"
    offset: float = OFFSET
    start_from: str | None = None
    hypernetwork: bool = True
    gru: bool = True
    constrained: bool = False
    norm_scope: NormScope = "full"
    align: int = 1
    compile: bool = False
    checkpoint_every: int = 200
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_choices(
            ratio_of=self.ratio_of,
            norm_scope=self.norm_scope,
            align=self.align,
            seed=self.seed,
            sequence_length=self.sequence_length,
        )
        super().__post_init__()
        if not math.isfinite(self.offset):
            raise LearnError(f"offset is {self.offset}; it must be a number")
        self._check_weights("regulariser_weight")
        check_one_of("estimator", self.estimator, get_args(EstimatorName))
        if not self.hypernetwork and not self.gru:
            raise LearnError("--no-gru changes the hypernetwork, which --no-hypernetwork leaves out; give one of them")

    @property
    def folder(self) -> Path:
        """`masks.learn` beside `masks.safetensors`."""
        return self.output.parent / f"{self.output.name.removesuffix('.safetensors')}.learn"

    @property
    def falling(self) -> bool:
        return self.decay

    def check_output(self, *, force: bool) -> None:
        check_mask_output(self.output, force=force)

    @property
    def method(self) -> str:
        """What the mask file calls this run's method."""
        parts = ["disp-llm", self.estimator]
        parts += [] if self.hypernetwork else ["no-hypernetwork"]
        parts += [] if self.gru else ["no-gru"]
        parts += ["constrained"] if self.constrained else []
        parts += [] if self.start_from is None else [f"from {self.start_from}"]
        return " ".join(parts)

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """The learning rate of step number `step`, counted from 0: constant, or falling linearly to zero."""
        return self.learning_rate * (1.0 - self.done(step, seconds) if self.decay else 1.0)
