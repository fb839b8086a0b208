"""Measure what a selection costs on this machine and what a weight does, for the cost model of `dispc.selection`.

Four chains of products are timed alternately, with one token and with a prompt. A link is two products, d -> m -> d::

    whole    d -> m -> d
    less     d -> m' -> d            what the weights cost
    all      select d of d, d -> m -> d       what a wide selection costs
    half     select d/2 of d, d/2 -> m -> d   and a narrow one
"""

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dispc.plan import Plan
from dispc.runtime.providers import PROVIDERS
from dispc.runtime.session import open_session
from dispc.selection import SelectionCosts
from dispc.support.graph import EXTRACTOR, MACHINE_LEARNING

CHAIN_BYTES, LINKS = 2**26, 32
"""A chain is longer than the caches are wide, if that takes no more links."""
PROMPT, ROUNDS, WARM = 128, 60, 3
LOW = 25
"""The percentile of the rounds that counts: what else the machine does only ever adds to a time."""
Chains = dict[str, Any]


def fit_costs(width: int, plan: Plan, threads: int) -> SelectionCosts:
    """The costs on the plan's provider, for a stream `width` wide."""
    with tempfile.TemporaryDirectory(prefix="dispc-costs-") as scratch:
        links = max(1, min(LINKS, CHAIN_BYTES // (16 * width * width)))
        sessions = {}
        for name, middle, selected in _chains(width):
            path = Path(scratch) / f"{name}.onnx"
            onnx.save(_chain(links, width, middle, selected, plan), path)
            sessions[name] = open_session(path, threads=threads, provider=PROVIDERS[plan.target.provider])
        token, prompt = (_time(sessions, width, plan, tokens) for tokens in (1, PROMPT))
    call, element, weight = _solve(token, width, links)
    prompt_call, prompt_element, prompt_weight = _solve(prompt, width, links)
    return SelectionCosts(
        call=round(call, 1),
        element=round(element, 4),
        weight=round(weight, 5),
        prompt_element=round(prompt_element / PROMPT + prompt_call / PROMPT / width, 4),
        prompt_weight=round(prompt_weight / PROMPT, 6),
    )


def _chains(width: int) -> Iterator[tuple[str, int, int | None]]:
    """Name, middle width, and elements to select in front of each link."""
    middle = 2 * width
    yield "whole", middle, None
    yield "less", middle - width // 2, None
    yield "all", middle, width
    yield "half", middle, width // 2


def _solve(nanoseconds: dict[str, float], width: int, links: int) -> tuple[float, float, float]:
    """Cost of a selection, of each of its elements, and of each weight."""
    whole, less, everything, half = (nanoseconds[name] / links for name in ("whole", "less", "all", "half"))
    weight = max(0.0, whole - less) / (2 * width * (width // 2))
    wide = everything - whole
    narrow = half - whole + weight * (width - width // 2) * 2 * width
    element = max(0.0, wide - narrow) / (width - width // 2)
    return max(0.0, wide - element * width), element, weight


def _chain(links: int, width: int, middle: int, selected: int | None, plan: Plan) -> Any:
    dtype = TensorProto.FLOAT16 if plan.dtype == "float16" else TensorProto.FLOAT
    kind = np.float16 if dtype == TensorProto.FLOAT16 else np.float32
    rng = np.random.default_rng(0)
    read = width if selected is None else selected
    indices = np.sort(rng.permutation(width)[:read])
    extract = plan.lowering.operator == EXTRACTOR
    nodes, weights, value = [], [numpy_helper.from_array(indices.astype(np.int64), "read")], "x"
    for link in range(links):
        if selected is not None:
            node = (
                helper.make_node(EXTRACTOR, [value, "read"], [f"selected{link}"], domain=MACHINE_LEARNING)
                if extract
                else helper.make_node("Gather", [value, "read"], [f"selected{link}"], axis=-1)
            )
            nodes.append(node)
            value = f"selected{link}"
        for name, shape in (("up", (read, middle)), ("down", (middle, width))):
            values = (rng.standard_normal(shape, dtype=np.float32) * shape[0] ** -0.5).astype(kind)
            weights.append(numpy_helper.from_array(values, f"{name}.weight{link}"))
            nodes.append(helper.make_node("MatMul", [value, f"{name}.weight{link}"], [f"{name}{link}"]))
            value = f"{name}{link}"
    ends = [helper.make_tensor_value_info(name, dtype, [1, "tokens", width]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "costs", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 21), (MACHINE_LEARNING, 1))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _time(sessions: Chains, width: int, plan: Plan, tokens: int) -> dict[str, float]:
    """Nanoseconds of a run of each chain."""
    x = np.ones((1, tokens, width), dtype=np.float16 if plan.dtype == "float16" else np.float32)
    times: dict[str, list[int]] = {name: [] for name in sessions}
    order = list(sessions)
    for number in range(ROUNDS + WARM):
        random.Random(number).shuffle(order)
        for name in order:
            start = time.perf_counter_ns()
            sessions[name].run(None, {"x": x})
            times[name].append(time.perf_counter_ns() - start)
    return {name: float(np.percentile(found[WARM:], LOW)) for name, found in times.items()}
