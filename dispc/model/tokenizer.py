"""The tokenizer of a model directory, or of an artifact, which has a copy of it."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dispc.model.families import FAMILIES
from dispc.support.errors import DataError, DispcError
from dispc.support.inputs import read_object, regular
from dispc.support.limits import Helper
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
NAMES_A_FILE = re.compile(r"(?!special_tokens_map_)\w+_files?")
"""Keys of tokenizer_config.json by which a tokenizer would read another file than those in its directory."""
LOADING = (60.0, 4 * 2**30)
"""Seconds and bytes that a tokenizer may take to load: what is in its files is as good as a program."""
WRAPPING = 2**16
"""Characters that a chat template may put around a prompt."""
TEMPLATE = (10.0, 512 * 2**20)
"""The same for a chat template."""
SECONDS_PER_BYTE, BYTES_PER_BYTE = 1 / 50_000, 1000
"""Additional seconds and bytes for each byte of text or its tokens: a hundred times what is needed."""


class Tokenizer:
    """The tokenizer that lies in a directory, by transformers, in a process of its own.

    Its files name normalisers, patterns and templates, which may loop, grow, or make the library panic.

    Raises:
        DataError: when there is none, or it is broken, or of another release of transformers.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer  # noqa: F401 - here, so that each process does not

        self.directory = directory
        check_files(directory)
        try:
            self.helper = Helper(partial(_answers, directory), *LOADING)
        except DispcError as error:
            raise DataError(f"{directory}: no tokenizer that transformers can load ({error})") from error
        for warning in self._ask("warnings", about=""):
            logging.getLogger(__name__).warning("%s: %s", directory, warning)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text; with `special` those that the tokenizer puts around one as well.

        Raises:
            DataError: when that fails, or takes too long or too much memory.
        """
        tokens: list[int] = self._ask("encode", text, special, about=text)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out.

        Raises:
            DataError: as `encode` does.
        """
        return str(self._ask("decode", list(tokens), about=bytes(16 * len(tokens))))

    def chat(self, prompt: str) -> str | None:
        """The prompt as a turn of a chat, as the chat template has it; None where there is none.

        Raises:
            DataError: when the template fails, or takes too long or too much memory.
        """
        try:
            text: str | None = self.helper.ask(["chat", prompt], *TEMPLATE)
        except DispcError as error:
            raise DataError(f"{self.directory}: the chat template fails ({error}); --raw does without it") from error
        if text is not None and len(text) > len(prompt) + WRAPPING:  # else it would set its own limits when it is read
            raise DataError(
                f"{self.directory}: the chat template makes {len(text):,} characters; --raw does without it"
            )
        return text

    def special(self, name: str) -> int | None:
        """The id of a special token, such as `eos`; None where there is none."""
        token: int | None = self._ask("special", name, about="")
        return token

    def _ask(self, *question: Any, about: str | bytes) -> Any:
        seconds = TEMPLATE[0] + SECONDS_PER_BYTE * len(about)
        memory = TEMPLATE[1] + BYTES_PER_BYTE * len(about)
        try:
            return self.helper.ask(question, seconds, memory)
        except DispcError as error:
            raise DataError(f"{self.directory}: the tokenizer fails ({error})") from error


def _answers(directory: Path) -> Callable[[list[Any]], Any]:
    """What a `Tokenizer` asks its process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread takes address space that nobody uses
    warnings: list[str] = []
    with _listening(warnings):
        tokenizer = load_tokenizer(directory)

    def chat(prompt: str) -> str | None:
        if not tokenizer.chat_template:
            return None
        turns = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    asked: dict[str, Callable[..., Any]] = {
        "encode": lambda text, special: list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]),
        # Cleaning up spaces would change text that is there already.
        "decode": partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        "chat": chat,
        "special": lambda name: getattr(tokenizer, f"{name}_token_id"),
        "warnings": lambda: warnings,
    }
    return lambda question: asked[question[0]](*question[1:])


@contextmanager
def _listening(warnings: list[str]) -> Iterator[None]:
    """Note the first line of whatever transformers warns of meanwhile."""
    from transformers.utils import logging as theirs

    handler, level, root = _Noting(warnings), theirs.get_verbosity(), logging.getLogger("transformers")
    theirs.set_verbosity_warning()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        theirs.set_verbosity(level)


class _Noting(logging.Handler):
    def __init__(self, warnings: list[str]) -> None:
        super().__init__()
        self.warnings = warnings

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage().strip().partition("\n")[0])


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of transformers that lies in `directory`, which is known to be harmless.

    Raises:
        Exception: whatever transformers raises where it cannot load it.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)


def check_files(directory: Path) -> None:
    """Look at the files of a tokenizer before a library reads them.

    Raises:
        DataError: when there are none, for a class that is not known to be harmless, and for what the installed
            transformers cannot read.
    """
    for name in (*FILES, *OTHERS):
        if (directory / name).exists():
            regular(directory / name, DataError, LARGEST)
    if not any((directory / name).exists() for name in FILES):
        raise DataError(f"{directory}: no tokenizer; one of {', '.join(FILES)} is needed")
    settings = _object(directory / "tokenizer_config.json")
    config = _object(directory / "config.json")
    path = directory / ("tokenizer_config.json" if settings.get("tokenizer_class") is not None else "config.json")
    kind = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if kind is not None and not (isinstance(kind, str) and kind in CLASSES):
        raise DataError(f"{path}: tokenizer_class is {kind!r}; dispc loads those of decoder models only")
    model_type = config.get("model_type")
    if kind is None and not (isinstance(model_type, str) and model_type in FAMILIES):
        raise DataError(
            f"{directory / 'config.json'}: model_type is {model_type!r}, whose tokenizer dispc does not load"
        )
    _check_settings(directory / "tokenizer_config.json", settings, kind)


def _object(path: Path) -> dict[str, Any]:
    return read_object(path, DataError) if path.exists() else {}


def _check_settings(path: Path, settings: Mapping[str, Any], kind: object) -> None:
    import transformers

    if odd := next((key for key in _keys(settings) if printable(key) != key), None):
        raise DataError(f"{path}: the key {printable(odd)} holds control characters; tokenizers would print them")
    if named := next((key for key, value in settings.items() if NAMES_A_FILE.fullmatch(key) and value), None):
        raise DataError(
            f"{path}: {named} is {settings[named]!r}; a tokenizer reads the files beside it only, remove the key"
        )
    newer = kind in RELEASE5 or isinstance(settings.get("extra_special_tokens"), list)
    if newer and transformers.__version__.startswith("4."):
        raise DataError(
            f"{path}: was written by transformers 5, and {transformers.__version__} cannot read it: "
            "pip install 'transformers>=5', or save the tokenizer again with release 4"
        )


def _keys(value: object) -> Iterator[str]:
    """Every key of a JSON value."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _keys(item)
