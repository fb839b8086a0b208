"""The tokenizer of a model directory, or of an artifact, which has a copy of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dispc.support.errors import DataError, DispcError, first_line
from dispc.support.inputs import read_object, regular
from dispc.support.limits import limited
from dispc.support.printable import printable

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of these holds the words of a tokenizer."""
OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")
LARGEST = 256 * 2**20
CLASSES = frozenset(
    name + suffix
    for name in (
        "PreTrainedTokenizer",
        "LlamaTokenizer",
        "GPT2Tokenizer",
        "Qwen2Tokenizer",
        "CodeGenTokenizer",
        "GemmaTokenizer",
        "CohereTokenizer",
        "GPTNeoXTokenizer",
        "BloomTokenizer",
        "NemotronTokenizer",
    )
    for suffix in ("", "Fast")
) | {"TokenizersBackend"}
"""Tokenizers of decoder models. transformers has others, which load pickles or start programs."""
RELEASE5 = ("TokenizersBackend",)
TEMPLATE_SECONDS, TEMPLATE_MEMORY = 10.0, 512 * 2**20
"""What a chat template may take: it is a program that came with the model."""


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer that lies in `directory`, by transformers.

    Raises:
        DataError: when there is none, or it is broken, or of another release of transformers.
    """
    from transformers import AutoTokenizer

    for name in (*FILES, *OTHERS):
        if (directory / name).exists():
            regular(directory / name, DataError, LARGEST)
    if not any((directory / name).exists() for name in FILES):
        raise DataError(f"{directory}: no tokenizer; one of {', '.join(FILES)} is needed")
    if (directory / "tokenizer_config.json").exists():
        _check(directory / "tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # what transformers and tokenizers raise for broken files shares no base class
        reason = f"{type(error).__name__} {first_line(error)}"
        raise DataError(f"{directory}: no tokenizer that transformers can load ({reason})") from error


def _keys(value: object) -> Iterator[str]:
    """Every key of a JSON value."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _keys(item)


def _check(path: Path) -> None:
    """Raise DataError for a class that is not known to be harmless, and for what the installed release cannot read."""
    import transformers

    told = read_object(path, DataError)
    if odd := next((key for key in _keys(told) if printable(key) != key), None):
        raise DataError(f"{path}: the key {printable(odd)} holds control characters; tokenizers would print them")
    kind = told.get("tokenizer_class")
    if kind is not None and kind not in CLASSES:
        raise DataError(f"{path}: tokenizer_class is {kind!r}; dispc loads those of decoder models only")
    newer = kind in RELEASE5 or isinstance(told.get("extra_special_tokens"), list)
    if newer and transformers.__version__.startswith("4."):
        raise DataError(
            f"{path}: was written by transformers 5, and {transformers.__version__} cannot read it: "
            "pip install 'transformers>=5', or save the tokenizer again with release 4"
        )


def apply_chat_template(tokenizer: Any, prompt: str) -> str:
    """The prompt as a turn of a chat, as the template that came with the tokenizer has it.

    Raises:
        DispcError: when the template fails, or takes too long or too much memory.
    """
    turns = [{"role": "user", "content": prompt}]

    def work() -> str:
        return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    try:
        return limited(work, TEMPLATE_SECONDS, TEMPLATE_MEMORY)
    except DispcError as error:
        raise DataError(f"the chat template fails ({error}); --raw does without it") from error
