"""Text to tokens: read through `datasets`, tokenised once into a cache, cut into windows."""

import codecs
import glob
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dispc.model.published import open_checkpoint
from dispc.model.tokenizer import LARGEST, Tokenizer
from dispc.support.errors import DataError, first_line
from dispc.support.extras import need
from dispc.support.files import whole
from dispc.support.inputs import contents, naming, regular

TextTokens = npt.NDArray[np.int32]
"""Token ids of a text as they are cached: half the bytes of what models read."""
LOADERS = {
    ".txt": "text",
    ".raw": "text",
    ".tokens": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
"""File suffix -> reader. Other files are read as text. A source that is no file is a dataset, unless its name ends in
one of these: then a file is missing.
"""
DATASET = re.compile(
    r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(/(?P<config>\w[\w.+-]*))?(:(?P<split>[\w.+%:\[\]-]+))?", re.ASCII
)
"""A dataset of the hub. Its name begins with a letter or a digit, and so does what follows a slash."""
SEPARATOR = "\n\n"
READER = b"2"
"""Part of the cache's keys; raised whenever the same source is read differently."""


def read_text(source: str) -> str:
    """The documents of `source`, joined by two newlines as the WikiText-2 protocol has it.

    `source` is a text file (every line is a document, as in the hub's copy of WikiText), a JSON lines or parquet file
    with a column `text`, or the name of a Hugging Face dataset, as OWNER/NAME[/CONFIG][:SPLIT]; of the old datasets
    without an owner, as NAME[:SPLIT]. The split is `train` unless it is named.

    Raises:
        DataError: when the source cannot be read or holds no text.
    """
    path = Path(source)
    rows = _file_rows(path) if path.exists() or path.suffix.lower() in LOADERS else _hub_rows(source)
    text = SEPARATOR.join(rows)
    if not text.strip():
        raise DataError(f"{source}: holds no text")
    return text


def _file_rows(path: Path) -> list[str]:
    if path.is_dir():
        raise DataError(f"{path}: is a directory; give a file in it")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    loader = LOADERS.get(path.suffix.lower(), "text")
    if loader == "text":  # `datasets` would drop the line ends, which the hub's WikiText rows have
        try:
            with naming(path):
                text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error})") from error
        lines = io.StringIO(text)  # str.splitlines knows more ends than this one
        return [line if line.strip() else "" for line in lines]
    need("datasets", "learn")
    import datasets

    if loader == "json" and not _begins_with_rows(path):  # pyarrow is ended by a signal where it says `null`
        raise DataError(f"{path}: not readable as json (a list of objects, or an object in each line, is expected)")
    try:
        with quiet_datasets():
            rows = datasets.load_dataset(loader, data_files=glob.escape(str(path)), split="train", streaming=True)
            return _column(rows, str(path))
    except (datasets.exceptions.DatasetGenerationError, ValueError, TypeError, OSError) as error:  # a row that is null
        raise DataError(f"{path}: not readable as {loader} ({first_line(error)})") from error


def _begins_with_rows(path: Path) -> bool:
    with naming(path), path.open("rb") as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"[", b"{")


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep `datasets` from logging the errors that it raises with a traceback: dispc prints them in one line."""
    import datasets

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


def _hub_rows(source: str) -> list[str]:
    need("datasets", "learn")
    import datasets

    try:
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as BUILDERS
    except ImportError as error:
        raise DataError(f"{source}: this release of datasets does not say which names read files here") from error
    asked, path = DATASET.fullmatch(source), source.partition(":")[0]
    for local in map(Path, {path: None, asked["name"] if asked else path: None}):
        if local.is_dir():  # `datasets` would read all that lies there
            raise DataError(f"{source}: {local} is a directory here; give the path of a file in it")
        if local.exists():
            raise DataError(f"{source}: {local} is a file here; give its path and nothing more")
    if asked is None or asked["name"] in BUILDERS:  # `text` reads what is here, `pandas` runs pickles
        raise DataError(f"{source}: no such file, and no name of a dataset: OWNER/NAME, OWNER/NAME/CONFIG, with :SPLIT")
    name, config, split = asked.group("name", "config", "split")
    try:
        rows = datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # no file, no network, no such dataset: `datasets` raises many kinds
        raise DataError(
            f"{source}: no such file, and no dataset of that name to be had ({first_line(error)})"
        ) from error
    return _column(rows, source)


def _column(rows: Any, source: str) -> list[str]:
    texts: list[str] = []
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise DataError(f"{source}: row {len(texts)} has no column 'text' with a string in it")
        texts.append(row["text"])
    return texts


def load_tokens(source: str, model: Path, cache: Path | None = None) -> TextTokens:
    """The tokens of `source` by the model's tokenizer, from the cache when they are there.

    The cache is keyed by the text's source (content of a file, name of a dataset) and the tokenizer's files.

    Raises:
        DataError: when there is no text, or the model has no tokenizer, or one of another vocabulary.
    """
    cache = cache or cache_folder() / "tokens"
    key = hashlib.sha256(READER + _tokenizer_digest(model) + _source_digest(source)).hexdigest()[:32]
    path = cache / f"{key}.npy"
    if (cached := _read_cache(path)) is not None:
        return _within_vocabulary(cached, model)
    tokens = _within_vocabulary(tokenise(read_text(source), model), model)
    if path.exists() and not path.is_file():  # a pipe, say, on which writing would wait
        return tokens
    try:
        with whole(path) as partial, open(partial, "wb") as file:  # np.save would add .npy to a name
            np.save(file, tokens, allow_pickle=False)
    except OSError as error:  # a home that is read-only, or full: the next run tokenises again
        logging.getLogger(__name__).warning("tokens are not cached in %s: %s", cache, error.strerror)
    return tokens


def _within_vocabulary(tokens: TextTokens, model: Path) -> TextTokens:
    largest, size = int(tokens.max(initial=0)), open_checkpoint(model).config.vocab_size
    if largest >= size:
        raise DataError(
            f"{model}: its tokenizer gives token {largest}, its vocab_size is {size}; they do not go together"
        )
    return tokens


def _read_cache(path: Path) -> TextTokens | None:
    """The tokens in a cache file; None where there is none, or a damaged one, which is then made again."""
    try:
        tokens: TextTokens = np.load(regular(path, DataError), allow_pickle=False)
    except (OSError, ValueError, EOFError, DataError):
        return None
    return tokens if tokens.ndim == 1 and tokens.dtype == np.int32 else None


def tokenise(text: str, model: Path) -> TextTokens:
    """The whole text as one run of tokens, with what the tokenizer puts before a text, if anything."""
    tokens = Tokenizer(model).encode(text)
    if max(tokens, default=0) > np.iinfo(np.int32).max:
        raise DataError(f"{model}: its tokenizer makes token {max(tokens)}, which no vocabulary has")
    return np.array(tokens, dtype=np.int32)


def windows(tokens: TextTokens, length: int, source: str) -> TextTokens:
    """Non-overlapping windows [n, length]; what remains at the end is left out.

    Raises:
        DataError: when there is not a single one.
    """
    count = len(tokens) // length
    if count == 0:
        raise DataError(f"{source}: {len(tokens)} tokens are too few for one window of {length}; give more text")
    return tokens[: count * length].reshape(count, length)


def batch(rows: TextTokens, step: int, size: int, seed: int) -> TextTokens:
    """The windows [size, length] of a step: a new order each epoch, and a function of seed and step alone."""
    chosen = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, len(rows))
        chosen.append(np.random.default_rng((seed, epoch)).permutation(len(rows))[offset])
    return rows[chosen]


def cache_folder() -> Path:
    """Where dispc keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dispc"


def source_name(source: str) -> str:
    """What masks and reports call a source: a file by its name, a dataset by its whole name."""
    path = Path(source)
    return path.name if path.exists() else source


def _source_digest(source: str) -> bytes:
    path = Path(source)
    if not path.is_file():
        return json.dumps(source).encode()
    with naming(path), path.open("rb") as file:
        return path.suffix.lower().encode() + hashlib.file_digest(file, "sha256").digest()


def _tokenizer_digest(model: Path) -> bytes:
    digest = hashlib.sha256()
    for path in sorted(model.glob("*")):
        if path.is_file() and ("token" in path.name or path.name in ("vocab.json", "merges.txt", "vocab.txt")):
            digest.update(path.name.encode() + contents(path, DataError, LARGEST))
    return digest.digest()
