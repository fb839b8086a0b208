"""Which build of ONNX Runtime is installed, and whether all of its files are its own and are there.

Several packages (onnxruntime-gpu, onnxruntime and others) bring the same module. Installed together they overwrite each
other's files, and uninstalling one takes files of the other along, while pip still calls that one installed.
"""

import importlib
import platform
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

from dispc.support.errors import first_line

MODULE = "onnxruntime"
NAMES = (
    "GraphOptimizationLevel",
    "InferenceSession",
    "OrtValue",
    "RunOptions",
    "SessionOptions",
    "__version__",
    "get_available_providers",
    "preload_dlls",
    "set_default_logger_severity",
)
"""What dispc uses of it."""
GPU = "onnxruntime-gpu"
GPU_PLATFORMS = (("Linux", "x86_64"), ("Windows", "AMD64"))
"""Where onnxruntime-gpu has wheels; pyproject.toml asks for onnxruntime elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """An installed package that brings the module: how many of its files are there, gone, or another package's."""

    name: str
    version: str
    files: int
    missing: int
    changed: int

    @property
    def whole(self) -> bool:
        return not self.missing and not self.changed

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def has_gpu_build() -> bool:
    """Whether this platform has wheels of onnxruntime-gpu."""
    return (platform.system(), platform.machine()) in GPU_PLATFORMS


def builds() -> tuple[Build, ...]:
    """Every installed package that brings ONNX Runtime's module, the one for GPUs first."""
    return tuple(_build(name) for name in sorted(_packages(), key=lambda name: (name != GPU, name)))


@cache
def _packages() -> frozenset[str]:
    """The names of these packages: found by reading the file lists of all that are installed."""
    return frozenset(packages_distributions().get(MODULE, ()))


def _build(name: str) -> Build:
    """Files are compared by size: the builds' libraries differ in it."""
    package = distribution(name)
    sized = [file for file in package.files or () if file.parts[0] == MODULE and file.size is not None]
    paths = [(Path(file.locate()), file.size) for file in sized]
    missing = sum(not path.is_file() for path, _ in paths)
    changed = sum(path.is_file() and path.stat().st_size != size for path, size in paths)
    return Build(name=name, version=package.version, files=len(paths), missing=missing, changed=changed)


def fault(installed: tuple[Build, ...]) -> str | None:
    """What is wrong with the build that this platform should have, in words; None when nothing is."""
    if not installed:
        return "no package that brings ONNX Runtime is installed"
    first, *others = installed
    if first.missing:
        return f"{first.missing} of {first.files} files of {first} are gone; another build was uninstalled over it"
    if first.changed:
        who = f" by {', '.join(map(str, others))}" if others else ""
        return f"{first.changed} of {first.files} files of {first} were overwritten{who}"
    return None


def mend(installed: tuple[Build, ...]) -> str:
    """The commands that bring a whole build, and leave no other in its place.

    pip takes a package for installed as long as it has its metadata: only --force-reinstall brings files back.
    """
    wanted = GPU if has_gpu_build() else MODULE
    others = [build.name for build in installed if build.name != wanted]
    leave = f"pip uninstall -y {' '.join(others)}; " if others else ""
    ours = next((build for build in installed if build.name == wanted), None)
    if ours is None:
        return leave + ("pip install 'onnxruntime-gpu[cuda,cudnn]'" if wanted == GPU else f"pip install {wanted}")
    return f"{leave}pip install --force-reinstall --no-deps {ours.name}=={ours.version}"


def unusable() -> str | None:
    """Why ONNX Runtime cannot be used at all, and what mends it, in one line; None when it can."""
    try:
        module = importlib.import_module(MODULE)
        lacking = [name for name in NAMES if not hasattr(module, name)]
        reason = f"its files are gone (it has no {lacking[0]})" if lacking else None
    except Exception as error:  # a library that does not load raises an OSError, a half-written module anything
        reason = f"{type(error).__name__}: {first_line(error)}"
    if reason is None:
        return None
    installed = builds()
    return f"ONNX Runtime cannot be imported: {fault(installed) or reason} ({mend(installed)})"
