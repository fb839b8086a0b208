"""Measure what a selection costs on this machine and what a weight does, for the cost model of `dispc.selection`.

Four chains of products are timed alternately, with one token and with a prompt. A link is two products, d -> m -> d.
A selection costs much less than they do, so links have many of them in a row::

    whole    d -> m -> d
    less     d -> m' -> d                                     what the weights cost
    wide     d -> select d, many times -> m -> d              what a selection of the whole width costs
    narrow   d -> select d/2, many times -> select d -> m -> d    and one of half of it
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dispc.plan import Plan
from dispc.runtime.providers import PROVIDERS
from dispc.runtime.session import open_session
from dispc.runtime.timing import alternate
from dispc.selection import SelectionCosts
from dispc.support.dtypes import DTYPES
from dispc.support.graph import MACHINE_LEARNING

CHAIN_BYTES, LINKS = 2**26, 32
"""A chain is longer than the caches are wide, if that takes no more links."""
SELECTIONS = 512
"""Of a chain, shared by its links."""
PROMPT, ROUNDS, WARM = 128, 60, 3
LOW = 25
"""The percentile of the rounds that counts: what else the machine does only ever adds to a time."""
AGREE = 2.0
"""By so much may the costs of even and odd rounds differ; a machine where they differ more is not quiet enough."""
Chains = dict[str, Any]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class _Price:
    """Nanoseconds of a selection, of each of its elements, and of each weight."""

    call: float
    element: float
    weight: float

    def of_selection(self, width: int) -> float:
        return self.call + self.element * width


def fit_costs(width: int, plan: Plan, threads: int) -> SelectionCosts:
    """The costs on the plan's provider, for a stream `width` wide; the plan's own where they cannot be measured.

    They cannot where one half of the rounds says more than `AGREE` times what the other half does.
    """
    with tempfile.TemporaryDirectory(prefix="dispc-costs-") as scratch:
        links = max(1, min(LINKS, CHAIN_BYTES // (16 * width * width)))
        sessions = {}
        for name, middle, selected in _chains(width):
            path = Path(scratch) / f"{name}.onnx"
            onnx.save(_chain(links, width, middle, selected, plan), path)
            sessions[name] = open_session(path, threads=threads, provider=PROVIDERS[plan.target.provider])
        times = [_time(sessions, width, plan, tokens) for tokens in (1, PROMPT)]
    halves = [[_solve(every(times_, start, 2), width, links) for times_ in times] for start in (0, 1)]
    if not all(agree(first, second, width) for first, second in zip(*halves, strict=True)):
        return plan.costs
    token, prompt = (_solve(every(times_, 0, 1), width, links) for times_ in times)
    return SelectionCosts(
        call=round(token.call, 1),
        element=round(token.element, 4),
        weight=round(token.weight, 5),
        prompt_element=round(prompt.of_selection(width) / PROMPT / width, 4),
        prompt_weight=round(prompt.weight / PROMPT, 6),
    )


def agree(first: _Price, second: _Price, width: int) -> bool:
    """Whether two measurements say about the same of a selection, and of a weight."""
    pairs = ((first.of_selection(width), second.of_selection(width)), (first.weight, second.weight))
    return all(0 < max(pair) <= AGREE * min(pair) for pair in pairs)


def every(times: Times, start: int, step: int) -> dict[str, float]:
    """Nanoseconds of a run of each chain, by some of the rounds."""
    return {name: 1e6 * float(np.percentile(values[start::step], LOW)) for name, values in times.items()}


def _chains(width: int) -> Iterator[tuple[str, int, int | None]]:
    """Name, middle width, and elements of the selections before each link."""
    middle = 2 * width
    yield "whole", middle, None
    yield "less", middle - width // 2, None
    yield "wide", middle, width
    yield "narrow", middle, width // 2


def _solve(nanoseconds: dict[str, float], width: int, links: int) -> _Price:
    count = _selections(links)
    whole, less, wide, narrow = (nanoseconds[name] / links for name in ("whole", "less", "wide", "narrow"))
    weight = max(0.0, whole - less) / (2 * width * (width // 2))
    # the narrow chain has one selection of `width` elements, the wide one `count`
    element = max(0.0, wide - narrow) / ((count - 1) * (width - width // 2))
    return _Price(max(0.0, (wide - whole) / count - element * width), element, weight)


def _selections(links: int) -> int:
    """Before each link."""
    return max(2, SELECTIONS // links)


def _chain(links: int, width: int, middle: int, selected: int | None, plan: Plan) -> Any:
    kind = np.dtype(DTYPES[plan.dtype].numpy)
    dtype = helper.np_dtype_to_tensor_dtype(kind)
    rng = np.random.default_rng(0)
    selections = [] if selected is None else [selected] * (_selections(links) - 1) + [width]
    # the last selection of a narrow link takes elements more than once: products stay as wide as in the other chains
    lists = {size: np.arange(size, dtype=np.int64) % (selected or 1) for size in selections}
    row = plan.lowering
    axis: dict[str, Any] = {"axis": -1} if row.reads_by == "Gather" else {}  # the other reads along the last one always
    nodes, weights, value = [], [numpy_helper.from_array(what, f"read{size}") for size, what in lists.items()], "x"
    for link in range(links):
        for number, size in enumerate(selections):
            result = f"selected{link}.{number}"
            inputs = [value, f"read{size}"]
            nodes.append(helper.make_node(row.reads_by, inputs, [result], domain=row.domain, **axis))
            value = result
        for name, shape in (("up", (width, middle)), ("down", (middle, width))):
            values = (rng.standard_normal(shape, dtype=np.float32) * shape[0] ** -0.5).astype(kind)
            weights.append(numpy_helper.from_array(values, f"{name}.weight{link}"))
            nodes.append(helper.make_node("MatMul", [value, f"{name}.weight{link}"], [f"{name}{link}"]))
            value = f"{name}{link}"
    ends = [helper.make_tensor_value_info(name, dtype, [1, "tokens", width]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "costs", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 21), (MACHINE_LEARNING, 1))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _time(sessions: Chains, width: int, plan: Plan, tokens: int) -> Times:
    """Milliseconds of each counted run of each chain."""
    x = np.ones((1, tokens, width), dtype=DTYPES[plan.dtype].numpy)
    runs = {name: partial(session.run, None, {"x": x}) for name, session in sessions.items()}
    return alternate(runs, ROUNDS, warmup_rounds=WARM, warmup_calls=0)
