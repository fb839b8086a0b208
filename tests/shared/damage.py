"""Ways to damage a file: a value of its JSON, some of its bytes, or what kind of file it is."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Random = np.random.Generator
DAMAGED_PICKLES = (b"\x80\x02.", b"\x80\x02(.", b"\x80\x02q", b"ustar", b"\x80\x02K\x01K\x02\x86R.")
"""Files that `torch.load` fails on in ways of its own: no stack, no mark, no argument, a tar, a call of a number."""
NAMES = ("extra", "auto_map", "rope_scaling", "\x1b[2J", "\ud800", "quantization_config", "head_dim")
DEEP: Any = json.loads("[" * 700 + "]" * 700)
NASTY: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    10**9,
    10**30,
    10**400,
    1e308,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x1b[31mred",
    "\x00",
    "../../etc/passwd",
    [],
    {},
    [[]],
    ["x"],
    [None],
    {"x": 1},
    {"__class__": "os.system"},
    "a" * 5000,
    "\ud800",
    "x\udcff",
    ["\udfff"],
    {"\ud800": 1},
    DEEP,
    "dropout" * 50_000,
    {"dropout" * 50_000: 0},
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def damage_json(file: Path, rng: Random) -> str:
    """Replace, remove or add one value."""
    content = json.loads(file.read_text())
    every = [path for path in places(content) if path][:4000]
    path = every[rng.integers(len(every))]
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    kind = rng.choice(["replace", "replace", "replace", "remove", "add", "rename"])
    value = NASTY[rng.integers(len(NASTY))]
    if kind == "replace":
        inner[path[-1]] = value
    elif kind == "remove" or not isinstance(inner, dict):
        del inner[path[-1]]
    elif kind == "add":
        inner[str(rng.choice(NAMES))] = value
    else:
        inner[f"{path[-1]}x"] = inner.pop(path[-1])
    file.write_text(json.dumps(content))
    return f"{kind} {'.'.join(map(str, path))} {value!r:.40}"


def damage_bytes(file: Path, rng: Random) -> str:
    """Flip a bit, cut, double, insert, or overwrite with zeros or noise; more often near the beginning."""
    content = bytearray(file.read_bytes())
    if not content:
        file.write_bytes(b"{")
        return "something in an empty file"
    at = int(rng.integers(len(content)) if rng.random() < 0.5 else rng.integers(min(len(content), 4096)))
    kind = str(rng.choice(["flip", "flip", "flip", "cut", "insert", "zeros", "noise", "double"]))
    size = int(rng.integers(1, 64))
    if kind == "flip":
        content[at] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        del content[at:]
    elif kind == "insert":
        content[at:at] = rng.bytes(size)
    elif kind == "double":
        content[at:at] = content[at : at + size]
    else:
        noise = bytes(size) if kind == "zeros" else rng.bytes(size)
        content[at : at + size] = noise[: len(content) - at]
    file.write_bytes(bytes(content))
    return f"{kind} at {at}"


def damage_kind(file: Path, rng: Random) -> str:
    """Put something else in the place of the file."""
    kind = str(
        rng.choice(
            ["pipe", "/dev/zero", "folder", "loop", "nowhere", "gone", "empty", "huge", "deep", "unreadable text"]
        )
    )
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "/dev/zero":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "nowhere":
        file.symlink_to("nowhere")
    elif kind == "empty":
        file.touch()
    elif kind == "huge":
        with file.open("wb") as out:
            out.truncate(2**41)
    elif kind == "deep":
        file.write_bytes(b"[" * 200_000)
    elif kind == "unreadable text":
        file.write_bytes(b"\xff\xfe\x00\x1b[31m")
    return kind
