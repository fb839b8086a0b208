"""Timing several things against each other, so that a machine that slows down slows all of them."""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def alternate(
    runs: Mapping[Name, Callable[[], object]],
    rounds: int,
    calls: int = 1,
    *,
    warmup_rounds: int = 1,
    warmup_calls: int = 2,
) -> dict[Name, list[float]]:
    """Milliseconds of a call of each of `runs`: one value per round, the median of `calls` calls.

    In each round every run has one turn. The order of the turns is shuffled, so that no run always follows the same
    other one, and is the same every time. The first `warmup_rounds` rounds and the first `warmup_calls` calls of each
    turn are not counted.
    """
    found: dict[Name, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(warmup_rounds + rounds):
        random.Random(number).shuffle(order)
        for name in order:
            call, times = runs[name], []
            for _ in range(warmup_calls + calls):
                start = time.perf_counter_ns()
                call()
                times.append((time.perf_counter_ns() - start) / 1e6)
            if number >= warmup_rounds:
                found[name].append(statistics.median(times[warmup_calls:]))
    return found
