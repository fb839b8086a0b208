"""IR to files: the model with external data, in a directory that appears all at once or not at all."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import onnx
import onnx_ir as ir

from dispc.manifest import MANIFEST
from dispc.model.weights import one_torch_thread, surface_weight_errors
from dispc.support.checker import check_model
from dispc.support.errors import ArtifactError
from dispc.support.signals import hold_signals

INLINE_BYTES = 1024
"""Smaller tensors stay inside model.onnx: ONNX Runtime reads shapes and axes from there."""
WORKERS = 4
"""Threads that read, slice and write weights; some of them always wait for the disk."""
IN_FLIGHT_BYTES = 384 * 2**20
"""Evaluated weights that may wait for the disk at any time."""


@contextmanager
def staged_directory(out: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place when the body succeeds, and vanishes when it does not.

    Raises:
        ArtifactError: when `out` exists and `force` is not set, or `out` is something other than an artifact.
    """
    out = out.absolute()
    check_output(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise ArtifactError(f"{out}: cannot be written ({error.strerror})") from error
    try:
        yield stage
        stage.chmod(0o777 & ~_umask())
        with hold_signals():
            check_output(out, force)  # again: something may have come there meanwhile
            _swap(stage, out)
    except OSError as error:
        where = str(error.filename or out).replace(str(stage), str(out))
        reason = error.strerror or f"{error}; is the disk full?"  # numpy says how many values it wrote, and not why
        raise ArtifactError(f"{where}: cannot be written ({reason})") from error
    finally:
        with hold_signals():
            shutil.rmtree(stage, ignore_errors=True)


def check_output(out: Path, force: bool) -> None:
    """Refuse an output path that must not be replaced.

    Raises:
        ArtifactError: saying why.
    """
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir():
        raise ArtifactError(f"{out}: cannot be written ({parent} is not a directory)")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ArtifactError(f"{out}: cannot be written (no permission to write in {parent})")
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise ArtifactError(f"{out}: exists already; use --force to replace it, or choose another -o")
    if not out.is_dir() or out.is_symlink() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise ArtifactError(f"{out}: is not an artifact of dispc, so --force does not replace it; choose another -o")


def _swap(stage: Path, out: Path) -> None:
    """Put `stage` in the place of `out`; the older `out` comes back when that fails."""
    if not out.exists():
        stage.rename(out)
        return
    old = stage.with_suffix(".old")
    try:
        out.rename(old)
        stage.rename(out)
    finally:
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
