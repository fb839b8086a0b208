"""Rows of tables by their names."""

from collections.abc import Mapping
from typing import TypeVar

from dispc.support.errors import CompileError

Row = TypeVar("Row")


def find_row(table: Mapping[str, Row], name: str, kind: str) -> Row:
    """The row called `name`; `kind` is what rows are called in messages, `target` for instance.

    Raises:
        CompileError: naming every row.
    """
    if name not in table:
        raise CompileError(f"unknown {kind} {name!r}; {kind}s are {', '.join(table)}")
    return table[name]
