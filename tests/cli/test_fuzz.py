"""A short run of the fuzzer (tests/shared/fuzzing.py), and proof that it finds what it is for."""

import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest

SHARED = Path(fuzzing.__file__).parent


def test_damaged_inputs_are_answered_rightly_or_in_one_line() -> None:
    """In a process of its own: forks want one that has not started threads."""
    words = (sys.executable, fuzzing.__file__, "--count", "40", "--seed", "7", "--minutes", "4")
    done = subprocess.run(words, capture_output=True, text=True, cwd=SHARED, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases with seed 7" in done.stdout


@pytest.mark.parametrize(
    ("status", "said", "left", "verdict"),
    [
        (0, "fine\n", set(), "right"),
        (2, "error: model/config.json: is not valid JSON\n", set(), "refused"),
        (1, "FAILED\n", set(), "exit 1"),
        (None, "", set(), "hang"),
        (-9, "", set(), "died (-9)"),
        (99, "Traceback\n", set(), "died (99)"),
        (2, "error: unexpected ValueError: x; --debug shows where, please report it\n", set(), "unexpected"),
        (2, "note: x\nerror: y\n", set(), "2 lines"),
        (2, "error: \x1b[31mred\n", set(), "escape"),
        (0, "fine\n", {"model/config.json.tmp"}, "changed model/config.json.tmp"),
    ],
)
def test_what_is_wrong_with_an_answer_is_found(status: int | None, said: str, left: set[str], verdict: str) -> None:
    assert fuzzing.judge("inspect model", status, said, left) == verdict


def test_a_case_is_a_function_of_its_number(tmp_path: Path) -> None:
    import numpy as np

    content = tmp_path / "x.json"
    told = []
    for _ in range(2):
        content.write_text('{"a": [1, {"b": 2}]}')
        told.append((fuzzing.damage_json(content, np.random.default_rng((3, 4))), content.read_text()))
    assert told[0] == told[1] and told[0][1] != '{"a": [1, {"b": 2}]}'
