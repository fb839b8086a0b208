"""Text from files that others wrote, as it may be shown."""

import re

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters that move the cursor, change colours, ring or reverse text, all but newline and tab; and halves
of surrogate pairs, which no encoding has: JSON can escape one alone, and bytes that are not UTF-8 become such in names.
"""
ENTITIES = str.maketrans({character: f"&#{ord(character)};" for character in "&<|\\"})
"""What would be markup in a cell of Markdown."""


def printable(text: str) -> str:
    """The text with every such character spelled out, as in `\\\\x1b[31m`, so that a terminal does not act on it."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def is_text(text: str) -> bool:
    """Whether the text can be encoded as UTF-8, as everything can that holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def markdown_cell(content: object) -> str:
    """Text that stays inside its cell of a Markdown table and shows as it is."""
    return " ".join(printable(str(content)).split()).translate(ENTITIES)
