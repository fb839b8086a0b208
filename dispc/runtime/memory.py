"""Does the dense reference fit into memory? Checked before the work starts."""

import math
from pathlib import Path

from dispc.model.checkpoint import Checkpoint
from dispc.support.errors import ArtifactError

SPARE_BYTES = 2**30


def needed_memory(checkpoint: Checkpoint, *, whole: bool = False, logits: int = 0) -> int:
    """Bytes for the artifact in float32, the reference beside it, and SPARE_BYTES for what is computed.

    The reference is read block by block, in float32 and float64: of one block both, of all others nothing. What is
    outside of the blocks stays, in float32. With `whole` all of it does (perplexity, `--verify-each`). `logits` are the
    numbers that the artifact's longest run gives: they are kept twice, and copied once.
    """
    sizes = {name: math.prod(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    parameters, blocks = sum(sizes.values()), checkpoint.config.num_hidden_layers
    inside = sum(size for name, size in sizes.items() if f"{checkpoint.family.layers.rpartition('.')[2]}." in name)
    reference = 4 * parameters if whole else 4 * (parameters - inside) + 12 * inside // blocks
    return 4 * parameters + reference + 12 * logits + SPARE_BYTES


def require_memory_for_reference(checkpoint: Checkpoint, *, whole: bool = False, logits: int = 0) -> None:
    """Refuse a validation that cannot finish.

    Raises:
        ArtifactError: when the reference and the artifact do not fit into free memory together.
    """
    needed, free = needed_memory(checkpoint, whole=whole, logits=logits), available_memory()
    if free is not None and needed > free:
        raise ArtifactError(
            f"validation needs about {needed / 2**30:.1f} GiB of memory for the reference and the artifact, "
            f"{free / 2**30:.1f} GiB are free; compile with --no-validate, and validate on a larger machine"
        )


CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of a container's memory, in cgroups version 2 and 1."""


def available_memory() -> int | None:
    """Bytes that can be had without swapping, in a container within its limit; None where it is not known."""
    available = [free for free in (_free_memory(), *(_free_in(*paths) for paths in CGROUPS)) if free is not None]
    return min(available, default=None)


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
