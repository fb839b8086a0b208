"""dispc: compile DISP-LLM pruned decoder models to ONNX artifacts that are right, small and fast.

The public names, each imported when it is first asked for::

    masks = dispc.Masks.load(Path("masks.safetensors"))
    dispc.compile_model(dispc.CompileOptions(model=Path("model"), output=Path("out"), target="onnx-cpu"))
    report = dispc.check(Path("out"), Path("model"))
    assert report.passed, report.headline
"""

from typing import TYPE_CHECKING

from dispc.support.lazy import importer
from dispc.support.version import __version__ as __version__

if TYPE_CHECKING:
    from dispc.compiler import CompileOptions as CompileOptions
    from dispc.compiler import ParityFailure as ParityFailure
    from dispc.compiler import compile_model as compile_model
    from dispc.inspect import inspect_path as inspect_path
    from dispc.learn.instant import instant_masks as instant_masks
    from dispc.learn.options import LearnOptions as LearnOptions
    from dispc.learn.recovery import recover as recover
    from dispc.learn.recovery_options import RecoverOptions as RecoverOptions
    from dispc.manifest import Manifest as Manifest
    from dispc.manifest import read_manifest as read_manifest
    from dispc.masks import Masks as Masks
    from dispc.model.published import open_checkpoint as open_checkpoint
    from dispc.reference.in_place import apply_masks as apply_masks
    from dispc.reference.masked import load_reference as load_reference
    from dispc.runtime.generate import Sampler as Sampler
    from dispc.runtime.generate import generate_text as generate_text
    from dispc.runtime.latency import LatencyOptions as LatencyOptions
    from dispc.runtime.session import Artifact as Artifact
    from dispc.support.errors import DispcError as DispcError
    from dispc.validate.checks.parity import Thresholds as Thresholds
    from dispc.validate.judge import check as check
    from dispc.validate.options import CheckOptions as CheckOptions
    from dispc.validate.report.report import Report as Report

HOMES = {
    "CompileOptions": "dispc.compiler",
    "ParityFailure": "dispc.compiler",
    "compile_model": "dispc.compiler",
    "inspect_path": "dispc.inspect",
    "instant_masks": "dispc.learn.instant",
    "LearnOptions": "dispc.learn.options",
    "Manifest": "dispc.manifest",
    "read_manifest": "dispc.manifest",
    "Masks": "dispc.masks",
    "open_checkpoint": "dispc.model.published",
    "recover": "dispc.learn.recovery",
    "RecoverOptions": "dispc.learn.recovery_options",
    "apply_masks": "dispc.reference.in_place",
    "load_reference": "dispc.reference.masked",
    "Sampler": "dispc.runtime.generate",
    "generate_text": "dispc.runtime.generate",
    "LatencyOptions": "dispc.runtime.latency",
    "Artifact": "dispc.runtime.session",
    "DispcError": "dispc.support.errors",
    "Thresholds": "dispc.validate.checks.parity",
    "check": "dispc.validate.judge",
    "CheckOptions": "dispc.validate.options",
    "Report": "dispc.validate.report.report",
}
"""Public name -> the module that it lives in."""

__all__ = ["__version__", *HOMES]
__getattr__ = importer(__name__, HOMES)


def __dir__() -> list[str]:
    return __all__
