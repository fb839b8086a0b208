"""Files that appear whole or not at all."""

import contextlib
import glob
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from errno import EIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from dispc.support.errors import DispcError, first_line
from dispc.support.printable import is_text, printable


def real(path: Path) -> Path:
    """Where a path leads, links followed; a loop of links leads to itself, and is an error to `Path.resolve` only."""
    return Path(os.path.realpath(path))


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file name to write to instead of `path`, whose place it takes at the end of the block.

    Folders that `path` is in are made. Where the block fails the file is removed, and an older one at `path` stays.
    Processes do not share it. A link is written through; what is no file (/dev/stdout, a pipe) is written to directly.

    Raises:
        OSError: with the name of `path`, which the system leaves out where it is a write that fails (a full disk).
    """
    target = real(path)
    partial = target.parent / f"{target.name}.{os.getpid()}.partial"
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_up(target)
        yield partial
        partial.replace(target)
    except OSError as error:
        if error.errno is None:  # libraries raise some with a message only
            raise OSError(EIO, first_line(error), str(path)) from error
        if error.filename in (None, str(partial)):
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def clear_up(target: Path) -> None:
    """Remove what processes that are no more left of `target` when they wrote it (`whole`)."""
    for left in target.parent.glob(f"{glob.escape(target.name)}.*.partial"):
        number = left.name.removeprefix(f"{target.name}.").removesuffix(".partial")
        if number.isdecimal() and not _runs(int(number)):
            with contextlib.suppress(OSError):
                left.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Find before the work what would be found after it.

    Raises:
        DispcError: for an output that would be written over one of the inputs, or into one that is a directory, and
            for one where nothing can be written.
    """
    sources = [real(source) for source in inputs]
    for path in outputs:
        if any(real(path).is_relative_to(source) for source in sources):
            raise DispcError(f"{path}: is an input, or in one; write somewhere else")
        require_place(path)


def require_place(path: Path, error: type[DispcError] = DispcError) -> None:
    """Raise `error` where no file or folder can be made at `path`: tried in the nearest folder there is, with a file
    that has no name. What is neither (/dev/stdout, a pipe) is no place to make anything, and stays as it is."""
    target = real(path)
    if target.exists() and not (target.is_file() or target.is_dir()):
        return
    folder = next(parent for parent in (*target.parents, target) if parent.exists())
    if not folder.is_dir():
        raise error(f"{path}: cannot be written ({folder} is not a directory)")
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as reason:
        raise error(f"{path}: cannot be written ({folder}: {reason.strerror or reason})") from reason


def write_text(path: Path, text: str) -> None:
    """Write a text file, control characters spelled out; an older one stays until this one is complete."""
    with whole(path) as partial:
        partial.write_text(printable(text), encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write readable JSON with a final newline, whole or not at all."""
    write_text(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """Readable JSON with a final newline, of what `plain` makes of the content."""
    return json.dumps(plain(content), indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """The same with None for figures that are no number, or infinite, and names that are not UTF-8 spelled out.

    JSON has none of these, or not in a form that every reader takes.
    """
    if isinstance(value, Mapping):
        return {plain(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, str):
        return value if is_text(value) else printable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
