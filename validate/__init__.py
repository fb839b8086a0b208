"""Run an artifact and judge it: `dispc.validate.check(artifact, reference)` gives a `Report`."""

from typing import TYPE_CHECKING

from dispc.support.lazy import importer

if TYPE_CHECKING:
    from dispc.runtime.latency import LatencyOptions as LatencyOptions
    from dispc.validate.checks.check import Check as Check
    from dispc.validate.checks.parity import Thresholds as Thresholds
    from dispc.validate.judge import check as check
    from dispc.validate.options import CheckOptions as CheckOptions
    from dispc.validate.report.report import Report as Report

HOMES = {
    "check": "dispc.validate.judge",
    "CheckOptions": "dispc.validate.options",
    "Report": "dispc.validate.report.report",
    "Check": "dispc.validate.checks.check",
    "Thresholds": "dispc.validate.checks.parity",
    "LatencyOptions": "dispc.runtime.latency",
}

__getattr__ = importer(__name__, HOMES)
