"""IR to files: the model, and its weights beside it, evaluated a few at a time."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir

from dispc.model.weights import one_torch_thread, surface_weight_errors
from dispc.support.errors import ArtifactError
from dispc.support.onnx_checker import check_model
from dispc.support.signals import hold_signals

INLINE_BYTES = 1024
"""Smaller tensors stay inside model.onnx: ONNX Runtime reads shapes and axes from there."""
WORKERS = 4
"""Threads that read, slice and write weights; some of them always wait for the disk."""
IN_FLIGHT_BYTES = 384 * 2**20
"""Evaluated weights that may wait for the disk at any time."""


def save_model(
    model: ir.Model, path: Path, progress: Callable[[str, int, int], None] = lambda name, done, total: None
) -> None:
    """Write `path` and its weights next to it (`path`.data), evaluating a few weights at a time.

    Raises:
        OSError: when the disk has not enough room.
        CheckpointError: when a weight cannot be read or is not finite.
    """
    needed = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        reason = f"the disk is too full: {needed / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free"
        raise OSError(errno.ENOSPC, reason)
    done = 0

    def report(tensor: ir.TensorProtocol, info: object) -> None:
        nonlocal done
        if interrupted():
            raise RuntimeError("interrupted")  # ends the other threads; the interrupt itself follows
        done += tensor.nbytes
        progress(tensor.name or "", done, needed)

    with hold_signals() as interrupted, one_torch_thread(), surface_weight_errors():
        ir.save(
            model,
            path,
            external_data=f"{path.name}.data",
            size_threshold_bytes=INLINE_BYTES,
            callback=report,
            max_workers=WORKERS,
            max_in_flight_bytes=IN_FLIGHT_BYTES,
        )


def check_file(path: Path) -> None:
    """Run onnx.checker with full (strict) shape inference over a written model.

    Raises:
        ArtifactError: with the checker's first line.
    """
    try:
        check_model(path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(f"{path}: onnx.checker refuses the model: {str(error).splitlines()[0]}") from error
