"""How an artifact is judged: the options of `dispc.check`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from dispc.runtime.latency import LatencyOptions
from dispc.support.errors import ArtifactError
from dispc.validate.checks import parity
from dispc.validate.checks.parity import Thresholds

Device = Literal["target", "cpu", "available"]


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """How to judge an artifact.

    Attributes:
        thresholds: what is allowed.
        device: judge where the artifact is meant to run (`target`), on the `cpu`, or there where the target's provider
            is not `available`.
        quick: only what a compilation ends with.
        drill: compare block by block even when parity holds; where it does not, that is done anyway.
        masks: the masks that are meant; None: those beside the reference, where there are any.
        reference_dtype: of the truth, `float64` (None) or `float32`, which is twice as fast.
        data: a text, as `dispc learn` takes it, to measure perplexity on, over `max_windows` windows (None: all) of
            `sequence_length` tokens (None: 2,048, or the model's limit).
        latency: measure times as these options say, beside the `dense` artifact where one is given.
        baseline: an earlier report; no figure may be worse than there by more than the share `max_regression`.
        seed: of the prompts.
    """

    thresholds: Thresholds = field(default_factory=lambda: parity.DEFAULTS)
    device: Device = "target"
    quick: bool = False
    drill: bool = False
    masks: Path | None = None
    reference_dtype: str | None = None
    data: str | None = None
    sequence_length: int | None = None
    max_windows: int | None = None
    latency: LatencyOptions | None = None
    dense: Path | None = None
    baseline: Path | None = None
    max_regression: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.device not in get_args(Device):
            raise ArtifactError(f"device {self.device!r}: choose {', '.join(get_args(Device))}")
