"""Run an artifact and judge it: `dispc.validate.check(artifact, reference)` gives a `Report`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dispc.validate.judge import check as check
    from dispc.validate.latency import LatencyOptions as LatencyOptions
    from dispc.validate.parity import Thresholds as Thresholds
    from dispc.validate.report import Check as Check
    from dispc.validate.report import Report as Report

HOMES = {"check": "judge", "Report": "report", "Check": "report", "Thresholds": "parity", "LatencyOptions": "latency"}


def __getattr__(name: str) -> Any:
    """Imported when asked for: the judge needs torch and ONNX Runtime, which most of dispc does not."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"dispc.validate.{HOMES[name]}"), name)
