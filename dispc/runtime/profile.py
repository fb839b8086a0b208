"""Where the time goes: bytes a step reads, how fast the device copies, time by operator, peak memory."""

import json
import os
import statistics
import subprocess
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dispc.runtime.bound import BoundDecoder
from dispc.runtime.edits import load_graph
from dispc.runtime.ort import ort
from dispc.runtime.session import CUDA, Artifact, open_session

COPY_BYTES = 2**28
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


def copy_speed(provider: str, threads: int) -> float:
    """Bytes per second, read and written, of the fastest of ten copies of 256 MiB on the device."""
    import torch

    if provider == CUDA:
        return _cuda_copy_speed()
    if threads:
        torch.set_num_threads(threads)
    source, target = torch.zeros(COPY_BYTES, dtype=torch.uint8), torch.ones(COPY_BYTES, dtype=torch.uint8)
    return 2 * COPY_BYTES / min(_timed(lambda: target.copy_(source)) for _ in range(10))


def _cuda_copy_speed() -> float:
    """An Identity node between two buffers on the device: ONNX Runtime copies, and torch need not know CUDA."""
    size = COPY_BYTES // 4
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [size]) for name in "xy"]
    node = onnx.helper.make_node("Identity", ["x"], ["y"], name="copy")
    graph = onnx.helper.make_graph([node], "copy", value[:1], value[1:])
    with tempfile.TemporaryDirectory(prefix="dispc-copy-") as scratch:
        path = Path(scratch) / "copy.onnx"
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
        session = open_session(path, optimise=False, provider=CUDA)
    buffers = [ort.OrtValue.ortvalue_from_shape_and_type([size], np.float32, "cuda") for _ in range(2)]
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", buffers[0])
    binding.bind_ortvalue_output("y", buffers[1])

    def copy() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return 2 * COPY_BYTES / min(_timed(copy) for _ in range(10))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def operator_times(
    path: Path, provider: str, *, threads: int, batch: int, past: int, rounds: int
) -> list[dict[str, Any]]:
    """Time by operator type over `rounds` single steps behind `past` tokens, by ONNX Runtime's profiler.

    Entries have `operator`, `milliseconds` (the median over the steps) and `share`.
    """
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
        {"operator": name, "milliseconds": duration, "share": duration / total}
        for name, duration in sorted(middle.items(), key=lambda entry: -entry[1])
    ]


def peak_bytes(provider: str) -> int | None:
    """Peak memory of this process: of the GPU as nvidia-smi has it, else resident; None where nobody says."""
    if provider == CUDA:
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        try:
            lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        except (OSError, subprocess.CalledProcessError):
            return None
        own = [line.split(",")[1] for line in lines if line.split(",")[0].strip() == str(os.getpid())]
        return int(own[0]) * 2**20 if own and own[0].strip().isdigit() else None
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), None)


def shares_buffer(artifact: Artifact) -> bool:
    """Past and present may be one buffer."""
    return artifact.padding == "right" and artifact.manifest["attention"] == "GroupQueryAttention"
