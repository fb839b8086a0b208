"""Files that others wrote: checked before they are read.

Reading a named pipe would block, /dev/zero never end, a file of gigabytes fill the memory: what is read at once must be
a regular file of a sensible size.
"""

import json
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO
from pathlib import Path
from typing import Any

from dispc.support.errors import DispcError, first_line
from dispc.support.printable import is_text

JSON_BYTES = 64 * 2**20
"""A tokenizer.json of a large vocabulary takes 30 MB; nothing else comes near."""
LARGEST, LEAST_POSITIONS = 2**24, 8
"""Larger than any size of a model, found before something so large is made; and fewer positions than any model has, of
which validation needs some to try."""
DIGITS, DEPTH, KEY = 300, 100, 512
"""Most digits of a whole number, most objects and lists in each other, and most characters of a key, that are expected:
more overflow floats, end in a RecursionError somewhere, and keep patterns busy for hours."""
HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
"""How JSON escapes half of a surrogate pair, which is no character unless the other half follows."""


def regular(path: Path, error: type[DispcError], limit: int | None = None) -> Path:
    """`path`, which must lead to a regular file, of no more than `limit` bytes.

    Raises:
        error: saying what it is instead.
        FileNotFoundError, NotADirectoryError, PermissionError: when there is nothing to look at.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        kind = "a directory" if stat.S_ISDIR(state.st_mode) else "no regular file (a pipe or a device)"
        raise error(f"{path}: is {kind}; a file is expected")
    if limit is not None and state.st_size > limit:
        raise error(f"{path}: has {state.st_size:,} bytes; no more than {limit:,} are expected of such a file")
    return path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError raised meanwhile the name of the file: the system names it only where one is opened."""
    try:
        yield
    except OSError as reason:
        if reason.filename is None and reason.errno is not None:
            raise OSError(reason.errno, reason.strerror, str(path)) from reason
        if reason.filename is None:  # libraries raise some with a message only
            raise OSError(EIO, first_line(reason), str(path)) from reason
        raise


def named_in_text(path: Path, error: type[DispcError]) -> Path:
    """`path`, whose name must be UTF-8: graphs, manifests and masks say where they lie and what they were made from.

    Raises:
        error: when it is not.
    """
    if not is_text(str(path.absolute())):
        raise error(f"{path.absolute()}: its name is not UTF-8; choose another, or rename the folder")
    return path


def contents(path: Path, error: type[DispcError], limit: int | None = JSON_BYTES) -> bytes:
    """What is in a file.

    Raises:
        error: as `regular` does.
        OSError: when it cannot be read, with its name.
    """
    with naming(regular(path, error, limit)):
        return path.read_bytes()


def read_object(path: Path, error: type[DispcError], limit: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error: when it is no regular file, too large, not JSON, nested too deeply, something else than an object, says
            something twice, or has a string that is no text, or a number or key of any length.
        FileNotFoundError, NotADirectoryError, PermissionError: when it cannot be opened.
    """
    try:
        raw = contents(path, error, limit)
        content = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_without_doubles, parse_int=_whole_number)
        _require_shallow(content)
        if HALF_PAIR.search(raw) and not is_text(json.dumps(content, ensure_ascii=False)):
            raise ValueError("a string in it holds half of a surrogate pair, which is no character")
    except RecursionError as reason:
        raise error(f"{path}: is not valid JSON (nested too deeply)") from reason
    except ValueError as reason:
        raise error(f"{path}: is not valid JSON ({first_line(reason)})") from reason
    if not isinstance(content, dict):
        raise error(f"{path}: a JSON object is expected")
    return content


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; with a key twice in it, which parsers read differently, it is no valid one."""
    content = dict(pairs)
    if (longest := max(map(len, content), default=0)) > KEY:
        raise ValueError(f"a key has {longest:,} characters")
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)} stands there twice")
    return content


def _whole_number(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a whole number has {len(digits):,} digits")
    return int(digits)


def _require_shallow(content: Any) -> None:
    """Raise RecursionError where objects and lists lie deeper in each other than DEPTH."""
    level = [content]
    for _ in range(DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise RecursionError
