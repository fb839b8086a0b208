"""Will the dense float32 reference fit into memory? Asked before the work, not after it."""

import math
from pathlib import Path

from dispc.checkpoint import Checkpoint
from dispc.errors import ArtifactError

SPARE_BYTES = 2**30


def require_memory_for_reference(checkpoint: Checkpoint) -> None:
    """Refuse to start what cannot finish.

    Raises:
        ArtifactError: when the model in float32, twice (reference and artifact), does not fit into free memory.
    """
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    needed, free = 8 * parameters + SPARE_BYTES, available_memory()
    if free is not None and needed > free:
        raise ArtifactError(
            f"validation needs about {needed / 2**30:.1f} GiB of memory for the float32 reference and the artifact, "
            f"{free / 2**30:.1f} GiB are free; pass --no-validate, and validate on a larger machine"
        )


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say (no /proc)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else kilobytes * 1024
