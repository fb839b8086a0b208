"""Text from files that others wrote, as it may be shown."""

import re

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters that move the cursor, change colours, ring or reverse text; all but newline and tab."""


def printable(text: str) -> str:
    """The text with every such character spelled out, as in `\\\\x1b[31m`, so that a terminal does not act on it."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
