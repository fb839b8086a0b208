"""Runs take turns, and what warms up is not counted. No time is asserted."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispc.runtime.timing import alternate

COUNT = st.integers(0, 3)


@given(
    names=st.sets(st.integers(), min_size=1, max_size=4), rounds=COUNT, calls=st.integers(1, 3), warm=COUNT, cold=COUNT
)
def test_every_run_has_one_turn_in_each_round(names: set[int], rounds: int, calls: int, warm: int, cold: int) -> None:
    called: list[int] = []
    runs = {name: lambda name=name: called.append(name) for name in names}  # type: ignore[misc]
    found = alternate(runs, rounds, calls, warmup_rounds=warm, warmup_calls=cold)
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys(names, rounds)
    turn = cold + calls
    turns = [called[start : start + turn] for start in range(0, len(called), turn)]
    assert all(len(set(one)) == 1 for one in turns)  # a turn is not interrupted
    order = [one[0] for one in turns]
    assert len(order) == len(names) * (warm + rounds)
    assert all(set(order[start : start + len(names)]) == names for start in range(0, len(order), len(names)))


def test_the_value_of_a_round_is_the_median_of_its_counted_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seconds = [0], iter([9, 9, 9, 9, 7, 1, 2, 6])  # a round to warm up, then one call, then 1, 2 and 6

    def run() -> None:
        clock[0] += next(seconds) * 10**9

    monkeypatch.setattr(time, "perf_counter_ns", lambda: clock[0])
    assert alternate({"": run}, 1, 3, warmup_rounds=1, warmup_calls=1) == {"": [2000]}
