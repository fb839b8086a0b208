"""Directories that appear all at once or not at all, whatever ends the process that writes them."""

import ctypes
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from dispc.support.errors import ArtifactError
from dispc.support.files import require_place
from dispc.support.inputs import named_in_text, read_object
from dispc.support.signals import hold_signals

ARTIFACT = "dispc.json"
"""The file by which an artifact is known."""
PARTIAL, OLD = ".partial", ".old"
"""How the names of what is being written, and of what is being replaced, end."""
PREFIX = "dispc-"
"""How the part of these names that `mkdtemp` chooses begins: others make hidden directories there too."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
Foreign = Callable[[Path], str | None]
"""Says of a directory what in it dispc did not write; None when there is nothing like that."""


def _nothing(out: Path) -> None:
    return None


@contextmanager
def staged_directory(out: Path, force: bool, marker: str = ARTIFACT, foreign: Foreign = _nothing) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place when the body succeeds, and vanishes when it does not.

    An older `out` is exchanged for it in one step, where the system has one. What a process that was killed left
    after is cleared up by the next one that writes `out`.

    Raises:
        ArtifactError: when `out` may not be replaced (`check_output`) or cannot be written.
    """
    out = out.absolute()
    check_output(out, force, marker, foreign)
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        recover(out, marker, foreign)
        stage = Path(mkdtemp(prefix=f".{out.name}.{PREFIX}", suffix=PARTIAL, dir=out.parent))
    except OSError as error:
        _remove_empty(made)
        raise ArtifactError(f"{out}: cannot be written ({error.strerror})") from error
    lock = os.open(stage, os.O_RDONLY)  # held until this process ends, however it does
    try:
        _lock(lock)
        yield stage
        stage.chmod(0o777 & ~_umask())
        with hold_signals():
            check_output(out, force, marker, foreign)  # again: something may have come there meanwhile
            _swap(stage, out)
    except OSError as error:
        named = [str(name) for name in (error.filename, error.filename2) if name]
        ours = [name for name in named if Path(name).absolute().is_relative_to(stage) or name == str(out)]
        if named and not ours:
            raise  # of a file that was read, or written elsewhere: reported as such
        where = (ours or [str(out)])[0].replace(str(stage), str(out))
        reason = error.strerror or f"{error}; is the disk full?"  # numpy says how many values it wrote, and not why
        raise ArtifactError(f"{where}: cannot be written ({reason})") from error
    finally:
        with hold_signals():
            shutil.rmtree(stage, ignore_errors=True)
            os.close(lock)
            _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # what holds something stays
            folder.rmdir()


def check_output(out: Path, force: bool, marker: str = ARTIFACT, foreign: Foreign = _nothing) -> None:
    """Refuse an output path that must not be replaced: what dispc did not write, or not all of it.

    Raises:
        ArtifactError: saying why.
    """
    named_in_text(out, ArtifactError)
    require_place(out, ArtifactError)
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise ArtifactError(f"{out}: exists already; use --force to replace it, or choose another -o")
    if reason := _strange(out, marker, foreign):
        raise ArtifactError(f"{out}: {reason}, so --force does not replace it; choose another -o")


def _strange(directory: Path, marker: str, foreign: Foreign) -> str | None:
    """What at this path is not dispc's; None for an empty directory, and for what dispc alone wrote."""
    if directory.is_symlink():
        return "is a link"
    if not directory.is_dir():
        return f"holds no {marker} of dispc"
    if not any(directory.iterdir()):
        return None
    return foreign(directory) if _wrote(directory / marker) else f"holds no {marker} of dispc"


def recover(out: Path, marker: str = ARTIFACT, foreign: Foreign = _nothing) -> None:
    """Clear up what killed processes left beside `out`: bring an older one back, and remove what was being written.

    What a process that still runs is writing stays, and what dispc did not make.

    Raises:
        OSError: when that is not possible.
    """
    for old in _left(out, OLD):
        if not _strange(old, marker, foreign):
            old.rename(old.with_suffix(PARTIAL) if out.exists() else out)
    for stage in _left(out, PARTIAL):
        try:
            lock = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or no directory
            continue
        try:
            if _lock(lock):
                shutil.rmtree(stage, ignore_errors=True)
        finally:
            os.close(lock)


def _left(out: Path, suffix: str) -> list[Path]:
    """What is named as `staged_directory` names what stands beside `out` while it writes."""
    name = re.compile(re.escape(f".{out.name}.{PREFIX}") + "[a-z0-9_]{8}" + re.escape(suffix))
    return sorted(path for path in out.parent.iterdir() if name.fullmatch(path.name))


def _lock(descriptor: int) -> bool:
    """Whether nobody else holds this file; false too where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _wrote(marker: Path) -> bool:
    try:
        content = read_object(marker, ArtifactError)
    except (OSError, ArtifactError):
        return False
    return isinstance(content.get("dispc"), str)


def _swap(stage: Path, out: Path) -> None:
    """Put `stage` in the place of `out`; the older `out` is where `stage` was, or comes back when that fails."""
    if not out.exists():
        stage.rename(out)
        return
    if exchange(stage, out):
        return
    old = stage.with_suffix(OLD)  # killed between the two: `recover` brings it back
    try:
        out.rename(old)
        stage.rename(out)
    finally:
        if old.exists():
            old.rename(stage if out.exists() else out)


def exchange(first: Path, second: Path) -> bool:
    """Let two paths change places in one step (Linux's renameat2); false where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return bool(renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
