"""What one check says: a figure against its limit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["passed", "failed", "skipped", "noted"]


SHOWN = 6
"""Faults that are named."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One figure against its limit, in `unit`. Without a limit it is noted and cannot fail.

    `detail` names what was run, or why it was skipped or failed; `figures` holds more numbers for programs.
    """

    name: str
    group: str
    status: Status
    detail: str
    figure: float | None = None
    limit: float | None = None
    unit: str = ""
    figures: Mapping[str, object] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.status != "failed"

    @staticmethod
    def against(
        name: str, group: str, figure: float, limit: float | None, unit: str, detail: str, **figures: object
    ) -> "Check":
        """Passed when `figure` is at most `limit`; NaN is not."""
        status: Status = "noted" if limit is None else "passed" if figure <= limit else "failed"
        return Check(
            name=name, group=group, status=status, detail=detail, figure=figure, limit=limit, unit=unit, figures=figures
        )

    @staticmethod
    def skipped(name: str, group: str, reason: str) -> "Check":
        return Check(name=name, group=group, status="skipped", detail=reason)

    @staticmethod
    def failed(name: str, group: str, reason: str) -> "Check":
        return Check(name=name, group=group, status="failed", detail=reason)


def listed(faults: Sequence[str]) -> str:
    """The first faults in one line, and how many more there are."""
    more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return "; ".join(faults[:SHOWN]) + more
