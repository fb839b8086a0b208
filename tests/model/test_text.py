"""Texts of every kind, read as the same documents; tokens cached by what they were made of."""

import json
import os
import pickle
import re
from contextlib import nullcontext
from pathlib import Path

import language
import numpy as np
import pytest
import tiny

from dispc.model import text as corpus
from dispc.model.text import load_tokens, read_text, source_name, windows
from dispc.support.errors import DataError

DOCUMENTS = ["The sea is salt.", "Depths are cold, and\nwide.", "café"]


@pytest.mark.extras
def test_json_lines_and_parquet_give_the_same_text(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": document, "id": 1}) + "\n" for document in DOCUMENTS))
    parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "a.parquet")
    assert read_text(str(lines)) == read_text(str(tmp_path / "a.parquet")) == "\n\n".join(DOCUMENTS)


def test_a_text_file_is_read_as_the_hub_has_wikitext(tmp_path: Path) -> None:
    """There a row is a line with its line end, and an empty one has none."""
    path = tmp_path / "wiki.raw"
    path.write_text(" \n = Title = \n \n Text . \n")
    assert read_text(str(path)) == "\n\n".join(["", " = Title = \n", "", " Text . \n"])
    path.write_text("a\u2028b\x0cc\n d")  # ends of lines for str.splitlines, but not in a file
    assert read_text(str(path)) == "\n\n".join(["a\u2028b\x0cc\n", " d"])


@pytest.mark.extras
@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "A.JSONL", "a.ndjson"])
def test_a_name_is_a_name_and_no_pattern(tmp_path: Path, name: str) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "a1.jsonl").write_text('{"text": "another file"}\n')
    (tmp_path / name).write_text('{"text": "this one"}\n')
    assert read_text(str(tmp_path / name)) == "this one"


@pytest.mark.extras
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"words": "x"}\n', "no column 'text'"),
        ("a.jsonl", '{"text": 5}\n', "no column 'text'"),
        ("a.jsonl", "{broken\n", "not readable as json"),
        ("a.parquet", "no parquet", "not readable as parquet"),
    ],
)
def test_unusable_files_are_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: str,
    says: str,
) -> None:
    pytest.importorskip("datasets")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=says):
        read_text(str(tmp_path / name))
    assert not caplog.records and "Failed" not in capfd.readouterr().err  # the error is told once


@pytest.mark.extras
@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/words", ("owner/words", None, "train")),
        ("owner/words:test", ("owner/words", None, "test")),
        ("owner/words/small:test[:10%]", ("owner/words", "small", "test[:10%]")),
        ("words:validation", ("words", None, "validation")),
    ],
)
def test_a_dataset_is_read_by_its_name(
    monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, str | None, str]
) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        calls.append((name, config, split))
        return [{"text": document} for document in DOCUMENTS]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text(source) == "\n\n".join(DOCUMENTS)
    assert calls == [asked]


@pytest.mark.extras
def test_a_dataset_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*given: object, **options: object) -> None:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"^owner/words: no such file, and no dataset .*\(no route to the hub\)$"):
        read_text("owner/words")
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: [{"words": "x"}])
    with pytest.raises(DataError, match="owner/words: row 0 has no column 'text'"):
        read_text("owner/words")


@pytest.mark.extras
@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("model:train", "model is a directory here"),
        ("./model:train", "model is a directory here"),
        ("owner/words", "owner/words: is a directory"),
        ("owner/words:train", "owner/words is a directory here"),
        ("owner/words/small", "owner/words is a directory here"),
        ("owner/words/small:train", "owner/words is a directory here"),
        ("notes:train", "notes is a file here"),
        ("./elsewhere", "no name of a dataset"),
        ("../words", "no name of a dataset"),
        ("owner/..", "is a directory"),
        ("/owner/words", "no name of a dataset"),
        ("a/b/c/d", "no name of a dataset"),
        ("C:\\words", "no name of a dataset"),
        ("C:/words:train", "no name of a dataset"),
        ("http://words", "no name of a dataset"),
        ("hf://datasets/owner/words", "no name of a dataset"),
        ("words:", "no name of a dataset"),
        ("", "."),
        ("text", "no name of a dataset"),
        ("json:train", "no name of a dataset"),
        ("pandas", "no name of a dataset"),
    ],
)
def test_what_lies_here_is_no_dataset_and_runs_nothing(
    source: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` would read all files of a directory, scripts of old ones and pickles (`pandas`) among them."""
    pytest.importorskip("datasets")

    class Planted:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for folder in (tmp_path, tmp_path / "model", tmp_path / "owner" / "words"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{folder.name}.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
        (folder / "train.pkl").write_bytes(pickle.dumps(Planted()))
        (folder / "notes").write_text("the sea")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=re.escape(says)) as refusal:
        read_text(source)
    assert "\n" not in str(refusal.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.TOKENS", "a.jsonl", "a.ndjson", "a.parquet"])
def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: no such file$"):
        read_text(str(tmp_path / name))


def test_a_directory_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a directory; give a file in it"):
        read_text(str(tmp_path))


def test_a_file_is_recorded_by_its_name_and_a_dataset_by_all_of_its(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert source_name(str(tmp_path / "a.txt")) == "a.txt"
    assert source_name("owner/words/small:test") == "owner/words/small:test"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, text = tiny.make_model("llama", tmp_path / "model"), tmp_path / "a.txt"
    language.make_tokenizer(model)
    text.write_text("the sea")
    expected = load_tokens(str(text), model, tmp_path / "cache")
    (tmp_path / "file").write_text("no folder")
    np.testing.assert_array_equal(load_tokens(str(text), model, tmp_path / "file" / "cache"), expected)
    assert "tokens are not cached in" in caplog.text and str(tmp_path / "file") in caplog.text


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY no more", b"text", "floats"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, content: bytes | str) -> None:
    model, text, cache = tiny.make_model("llama", tmp_path / "model"), tmp_path / "a.txt", tmp_path / "cache"
    language.make_tokenizer(model)
    text.write_text("the sea")
    first = load_tokens(str(text), model, cache)
    (file,) = cache.iterdir()
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, first.astype(np.float32))
    for _ in range(2):
        again = load_tokens(str(text), model, cache)
        assert again.dtype == np.int32
        np.testing.assert_array_equal(again, first)
    assert [np.load(path).dtype for path in cache.iterdir()] == [np.int32]


def test_a_pipe_in_the_cache_is_not_waited_for(tmp_path: Path) -> None:
    model, text, cache = tiny.make_model("llama", tmp_path / "model"), tmp_path / "a.txt", tmp_path / "cache"
    language.make_tokenizer(model)
    text.write_text("A text of some words.")
    first = load_tokens(str(text), model, cache)
    (file,) = cache.iterdir()
    file.unlink()
    os.mkfifo(file)
    np.testing.assert_array_equal(load_tokens(str(text), model, cache), first)
    assert list(cache.iterdir()) == [file] and file.is_fifo()


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_text(str(tmp_path / "a.txt"))


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(Exception, match=r"pip install 'dispc\[learn\]'"):
        read_text(str(tmp_path / "a.jsonl"))


def test_tokens_come_from_the_cache_until_text_or_tokenizer_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, cache = tiny.make_model("llama", tmp_path / "model"), tmp_path / "a.txt", tmp_path / "cache"
    language.make_tokenizer(model)
    text.write_text("the sea")
    made = []
    tokenise = corpus.tokenise
    monkeypatch.setattr(corpus, "tokenise", lambda *given: made.append(given) or tokenise(*given))
    first = load_tokens(str(text), model, cache)
    np.testing.assert_array_equal(load_tokens(str(text), model, cache), first)
    assert len(made) == 1
    text.write_text("the old sea")
    assert len(load_tokens(str(text), model, cache)) > len(first)
    language.make_tokenizer(model, None, clean_up_tokenization_spaces=True)
    load_tokens(str(text), model, cache)
    assert len(made) == 3
    assert not list(cache.glob("*partial*"))


def test_windows_do_not_overlap_and_leave_out_the_rest() -> None:
    rows = windows(np.arange(11, dtype=np.int32), 4, "x")
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3], [4, 5, 6, 7]])
    with pytest.raises(DataError, match="too few"):
        windows(np.arange(3, dtype=np.int32), 4, "x")


def test_the_order_of_the_data_depends_on_the_seed_alone() -> None:
    rows = np.arange(20, dtype=np.int32).reshape(10, 2)
    epoch = np.concatenate([corpus.batch(rows, step, 2, seed=3) for step in range(5)])
    assert sorted(epoch[:, 0].tolist()) == sorted(rows[:, 0].tolist())
    np.testing.assert_array_equal(corpus.batch(rows, 3, 2, seed=3), epoch[6:8])
    np.testing.assert_array_equal(corpus.batch(rows, 0, 10, seed=3), epoch)
    assert any(
        not np.array_equal(corpus.batch(rows, step, 2, seed=4), corpus.batch(rows, step, 2, seed=3))
        for step in range(5)
    )


@pytest.mark.parametrize("content", [None, "", "{}", "nonsense"])
@pytest.mark.parametrize("variant", ["llama", "opt", "phi", "qwen3"])
def test_a_tokenizer_that_is_missing_or_broken_is_named(tmp_path: Path, variant: str, content: str | None) -> None:
    model, text = tiny.make_model(variant, tmp_path / "model"), tmp_path / "a.txt"
    text.write_text("the sea")
    if content is not None:
        (model / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="no tokenizer"):
        load_tokens(str(text), model, tmp_path / "cache")


def test_a_tokenizer_of_another_vocabulary_is_refused_from_the_cache_too(tmp_path: Path) -> None:
    model, text = tiny.make_model("llama", tmp_path / "model"), tmp_path / "a.txt"
    language.make_tokenizer(model)
    text.write_text("the sea")
    largest = int(load_tokens(str(text), model, tmp_path / "cache").max())
    config = json.loads((model / "config.json").read_text())
    for size, fits in ((largest + 1, True), (largest, False)):
        (model / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
        for cache in ("cache", f"new {size}"):
            with nullcontext() if fits else pytest.raises(DataError, match=f"token {largest}, its vocab_size is"):
                load_tokens(str(text), model, tmp_path / cache)
