"""Markdown pages as lists of blocks (headings, paragraphs, tables), which a blank line separates."""

from collections.abc import Iterable, Sequence


def page(blocks: Iterable[str]) -> str:
    """The text of a page."""
    return "\n\n".join(blocks) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The block of a table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
