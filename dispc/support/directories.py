"""Directories that appear all at once or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from dispc.support.errors import ArtifactError
from dispc.support.signals import hold_signals

ARTIFACT = "dispc.json"
"""The file by which an artifact is known."""


@contextmanager
def staged_directory(out: Path, force: bool, marker: str = ARTIFACT) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place when the body succeeds, and vanishes when it does not.

    Raises:
        ArtifactError: when `out` exists and `force` is not set, or holds no file `marker`: it is something else then.
    """
    out = out.absolute()
    check_output(out, force, marker)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise ArtifactError(f"{out}: cannot be written ({error.strerror})") from error
    try:
        yield stage
        stage.chmod(0o777 & ~_umask())
        with hold_signals():
            check_output(out, force, marker)  # again: something may have come there meanwhile
            _swap(stage, out)
    except OSError as error:
        where = str(error.filename or out).replace(str(stage), str(out))
        reason = error.strerror or f"{error}; is the disk full?"  # numpy says how many values it wrote, and not why
        raise ArtifactError(f"{where}: cannot be written ({reason})") from error
    finally:
        with hold_signals():
            shutil.rmtree(stage, ignore_errors=True)


def check_output(out: Path, force: bool, marker: str = ARTIFACT) -> None:
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
    if not out.is_dir() or out.is_symlink() or (any(out.iterdir()) and not (out / marker).is_file()):
        raise ArtifactError(f"{out}: holds no {marker} of dispc, so --force does not replace it; choose another -o")


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
