"""Where the time goes: the bytes that a step reads, and time by operator."""

import json
import statistics
import tempfile
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dispc.runtime.bound import BoundDecoder
from dispc.runtime.edits import load_graph
from dispc.runtime.providers import Provider
from dispc.runtime.session import Artifact

ROTARY_CACHES = (7, 8)
"""Inputs of GroupQueryAttention: cosines and sines of every position."""


def bytes_read(path: Path) -> int:
    """Bytes of the weights that a step reads in full: all but tables that only a Gather of rows looks up."""
    total = 0
    for value in load_graph(path).graph.initializers.values():
        looked_up = all(
            (use.node.op_type.startswith("Gather") and use.idx == 0)
            or use.node.op_type.endswith("RotaryEmbedding")
            or (use.node.op_type == "GroupQueryAttention" and use.idx in ROTARY_CACHES)
            for use in value.uses()
        )
        if value.const_value is not None and not looked_up:
            total += value.const_value.nbytes
    return total


@dataclass(frozen=True)
class OperatorTime:
    """Time of all nodes of one operator type in a step (the median over the steps), and its share of the step."""

    operator: str
    milliseconds: float
    share: float


def operator_times(
    path: Path, provider: Provider, *, threads: int, batch: int, past: int, rounds: int
) -> list[OperatorTime]:
    """Time by operator type over `rounds` single steps after `past` tokens, by ONNX Runtime's profiler."""
    with tempfile.TemporaryDirectory(prefix="dispc-profile-") as scratch:
        prefix = Path(scratch) / "profile"
        artifact = Artifact(path, threads, provider=provider, profile=prefix)
        decoder = BoundDecoder(artifact, batch=batch, capacity=past + 1, shared=shares_buffer(artifact))
        decoder.feed(np.ones((batch, past), dtype=np.int64))
        decoder.prepare(np.ones((batch, 1), dtype=np.int64))
        for _ in range(rounds):
            decoder.run()
        events = json.loads(Path(artifact.session.end_profiling()).read_text(encoding="utf-8"))
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")[1:]  # the first is the prefill
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(starts))
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            run = bisect_right(starts, event["ts"]) - 1
            if run >= 0:
                spent[event["args"]["op_name"]][run] += event["dur"] / 1000
    middle = {name: statistics.median(times) for name, times in spent.items()}
    total = sum(middle.values()) or 1.0
    return [
        OperatorTime(name, duration, duration / total)
        for name, duration in sorted(middle.items(), key=lambda entry: -entry[1])
    ]


def shares_buffer(artifact: Artifact) -> bool:
    """Past and present may be one buffer."""
    return artifact.manifest.shares_buffer
