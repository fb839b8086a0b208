"""Timing several things against each other, so that a machine that slows down slows all of them."""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
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

    The first `warmup_rounds` rounds and the first `warmup_calls` calls of each turn are not counted.
    """
    medians: dict[Name, list[float]] = {name: [] for name in runs}
    for name, counts in turns(runs, rounds, warmup_rounds=warmup_rounds):
        call, times = runs[name], []
        for _ in range(warmup_calls + calls):
            start = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - start) / 1e6)
        if counts:
            medians[name].append(statistics.median(times[warmup_calls:]))
    return medians


def turns(names: Iterable[Name], rounds: int, *, warmup_rounds: int = 1) -> Iterator[tuple[Name, bool]]:
    """Whose turn it is, and whether the turn counts: each once in every round, but not in the first `warmup_rounds`.

    The order is shuffled, so that none always follows the same other one, and is the same every time.
    """
    order = list(names)
    for number in range(warmup_rounds + rounds):
        random.Random(number).shuffle(order)
        for name in order:
            yield name, number >= warmup_rounds
