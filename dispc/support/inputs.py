"""Files that others wrote: checked before they are read.

Reading a named pipe would block, /dev/zero never end, a file of gigabytes fill the memory: what is read at once must be
a regular file of a sensible size.
"""

import json
import stat
from pathlib import Path
from typing import Any

from dispc.support.errors import DispcError, first_line

JSON_BYTES = 64 * 2**20
"""A tokenizer.json of a large vocabulary takes 30 MB; nothing else comes near."""


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


def read_object(path: Path, error: type[DispcError], limit: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error: when it is no regular file, too large, not JSON, nested too deeply, or something else than an object.
        FileNotFoundError, NotADirectoryError, PermissionError: when it cannot be opened.
    """
    try:
        content = json.loads(regular(path, error, limit).read_bytes().decode("utf-8-sig"))
    except RecursionError as reason:
        raise error(f"{path}: is not valid JSON (nested too deeply)") from reason
    except ValueError as reason:
        raise error(f"{path}: is not valid JSON ({first_line(reason)})") from reason
    if not isinstance(content, dict):
        raise error(f"{path}: a JSON object is expected")
    return content
