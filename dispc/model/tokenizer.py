"""The tokenizer of a model directory, or of an artifact, which has a copy of it."""

from pathlib import Path
from typing import Any

from dispc.support.errors import DataError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of these holds the words of a tokenizer."""


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer that lies in `directory`, by transformers.

    Raises:
        DataError: when there is none, or it is broken.
    """
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in FILES):
        raise DataError(f"{directory}: no tokenizer; one of {', '.join(FILES)} is needed")
    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # what transformers and tokenizers raise for broken files shares no base class
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise DataError(f"{directory}: no tokenizer that transformers can load ({reason})") from error
