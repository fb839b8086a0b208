"""Will the dense reference fit into memory? Asked before the work, not after it."""

import math
from pathlib import Path

from dispc.model.checkpoint import Checkpoint
from dispc.support.errors import ArtifactError

SPARE_BYTES = 2**30


def needed_memory(checkpoint: Checkpoint, bytes_each: int) -> int:
    """Bytes for the reference, at `bytes_each` for a parameter, and an artifact beside it."""
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return (bytes_each + 4) * parameters + SPARE_BYTES


def fits_memory(checkpoint: Checkpoint, bytes_each: int) -> bool:
    """Whether the reference and an artifact fit into free memory together, as far as the system says."""
    free = available_memory()
    return free is None or needed_memory(checkpoint, bytes_each) <= free


def require_memory_for_reference(checkpoint: Checkpoint, bytes_each: int = 4) -> None:
    """Refuse to start what cannot finish. `bytes_each` is what a parameter of the reference takes.

    Raises:
        ArtifactError: when the reference and the artifact do not fit into free memory together.
    """
    needed, free = needed_memory(checkpoint, bytes_each), available_memory()
    if free is not None and needed > free:
        raise ArtifactError(
            f"validation needs about {needed / 2**30:.1f} GiB of memory for the float{8 * bytes_each} reference and "
            f"the artifact, {free / 2**30:.1f} GiB are free; compile with --no-validate, "
            "and validate on a larger machine"
        )


CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of a container's memory, in cgroups version 2 and 1."""


def available_memory() -> int | None:
    """Bytes that can be had without swapping, in a container within its limit; None where the system does not say."""
    found = [free for free in (_free_memory(), *(_free_in(*paths) for paths in CGROUPS)) if free is not None]
    return min(found, default=None)


def _free_in(limit: str, used: str) -> int | None:
    """What a control group has left; None where it has no limit ("max"), or there is no such group."""
    try:
        return max(0, int(Path(limit).read_text(encoding="ascii")) - int(Path(used).read_text(encoding="ascii")))
    except (OSError, ValueError):
        return None


def _free_memory() -> int | None:
    """Bytes that the machine can give without swapping; None where it has no /proc."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else kilobytes * 1024
