"""The scripts that write docs/tradeoff.md and the texts of learning: frontiers, sentences, prompts."""

import json
from pathlib import Path
from typing import Any

import tradeoff_page
from dense_answers import prompts
from hypothesis import given
from hypothesis import strategies as st
from learning_text import known_words, with_answers


def point(ratio: int, format: str, milliseconds: float, megabytes: float, perplexity: float | None) -> dict[str, Any]:
    found = {"16 of 1024": perplexity} if perplexity else {}
    return {
        "ratio": ratio,
        "format": format,
        "recovered": bool(ratio),
        "compiler": "dispc",
        "bytes": megabytes * 1e6,
        "milliseconds": milliseconds,
        "perplexity": found,
        "command": f"dispc compile {ratio} {format}",
    }


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=1))
def test_nothing_on_the_frontier_is_beaten_and_everything_else_is(pairs: list[tuple[float, float]]) -> None:
    rows = [{"time": time, "perplexity": perplexity} for time, perplexity in pairs]
    front = tradeoff_page.frontier(rows, "time")
    for row in rows:
        beaten = any(
            other["time"] <= row["time"] and other["perplexity"] <= row["perplexity"] and other != row
            for other in front
        )
        assert beaten != (row in front)


def test_the_page_says_who_wins_and_who_does_not(tmp_path: Path) -> None:
    points = {
        "a": point(0, "float32", 20.0, 540, None),
        "b": point(0, "int8", 10.0, 154, 23.0),
        "c": point(20, "int8", 9.0, 131, 22.0),
        "d": point(50, "int8", 8.0, 96, 40.0),
        "e": point(20, "int4", 5.0, 70, None),
    }
    known = {"points": points, "environment": {"cpu": "a CPU"}, "threads": 2, "past": 64, "round_count": 5}
    report = {"dense": {"wiki.test, 16 of 1024": 22.9, "wiki.test": 21.6, "answers": 4.2}}
    tradeoff_page.write_tradeoff(known, report, tmp_path)
    page = (tmp_path / "tradeoff.md").read_text()
    assert "| dense, float32 | 22.90 | 21.60 | 20.00 | 540 |  |" in page
    assert "int4" not in page  # its perplexity is not known
    assert "Better than every dense one" not in page  # none is as fast, or as small, as those
    assert "Of the 2 on the frontier of time 2 are pruned." in page
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_sentences_with_unknown_words_are_left_out_and_their_paragraph_stays() -> None:
    article = " = A = \n One , two . An <unk> line . Three . \n <unk> \n"
    assert known_words(article, sentences=True) == " = A = \n One , two . Three . \n\n"
    assert known_words(article) == " = A = \n"


def test_answers_are_among_the_articles_as_often_as_asked(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text(json.dumps({"text": "Hello."}) + "\n")
    lines = with_answers([" = A = \n \n One . \n", " = B = \n"], tmp_path / "answers.jsonl", 3)
    rows = [json.loads(line)["text"] for line in lines]
    assert rows.count("Hello.") == 3 and rows.count(" = A = \n") == rows.count(" = B = \n") == 1
    assert rows[rows.index(" = A = \n") + 1 :][:2] == ["", " One . \n"]


def test_prompts_are_those_of_their_seed_and_do_not_repeat() -> None:
    first, again, other = prompts(100, 0), prompts(100, 0), prompts(100, 1)
    assert first == again != other
    questions = [text for text, question in first if question]
    assert len(questions) == len(set(questions)) == 90
