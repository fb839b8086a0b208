"""The measuring half of gpu.py: one model in one runtime, in a process of its own, since CUDA errors spoil a process.

    .venv/bin/python benchmarks/gpu_cells.py JOB [JOB ...]

JOB is the JSON of a `Job`. Prints a line of JSON about the device, then one for each cell as soon as it is done, each
with the number of its job.
"""

import fcntl
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from common import GIB, alternate, summary
from decoder import Decoder, OnnxStep
from machine import graphics_cards

from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.families import DecoderConfig
from dispc.model.published import open_checkpoint
from dispc.validate.checks.parity import LIMITS, logit_error

if TYPE_CHECKING:
    from algorithm1 import TorchStep

EAGER, GRAPHED, COMPILED = "PyTorch", "PyTorch, CUDA graph", "PyTorch compiled"
ORT, CUDA_GRAPH = "ORT", "ORT, CUDA graph"
DECODE_ONLY = (GRAPHED, COMPILED, CUDA_GRAPH)
"""Runtimes that save launches, which a prefill has few of for its work."""
PYTORCH = {"cuda": (EAGER, GRAPHED, COMPILED), "cpu": (EAGER, COMPILED)}
ONNX_RUNTIME = {"cuda": (ORT, CUDA_GRAPH), "cpu": (ORT,)}
"""Device -> how PyTorch and ONNX Runtime are run there."""
CHECKED_TOKENS = 16
PROFILED_CALLS = 5
INDEXING = ("gather", "scatter")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to time: `decode` a token behind `tokens` in the caches, or `prefill` as many."""

    phase: str
    batch: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model and how to run it. No artifact means PyTorch; no masks mean the dense model.

    `reference` is the file of eager PyTorch's logits; None compares with nothing (quantised weights have other logits).
    `turns` is a file to lock while something is timed, for jobs that start together.
    """

    model: str
    masks: str | None
    artifact: str | None
    reference: str | None
    runtimes: tuple[str, ...]
    device: str
    dtype: str
    cells: tuple[Cell, ...]
    rounds: int
    calls: int
    turns: str | None = None

    def planned(self) -> list[tuple[str, Cell]]:
        """Every (runtime, cell), in order."""
        return [(r, c) for r in self.runtimes for c in self.cells if r not in DECODE_ONLY or c.phase == "decode"]

    @staticmethod
    def from_json(text: str) -> "Job":
        raw = json.loads(text)
        return Job(**raw | {"cells": tuple(Cell(**cell) for cell in raw["cells"]), "runtimes": tuple(raw["runtimes"])})


class Graphed:
    """Algorithm 1 eager, its kernels captured once in a CUDA graph: the same work without the time of launching it."""

    def __init__(self, model: Any) -> None:
        self.model, self.allocate, self.bytes_read = model, model.allocate, model.bytes_read

    def bind(self, ids: npt.NDArray[np.int64], past: int) -> "GraphedStep":
        return GraphedStep(self.model.bind(ids, past))


class GraphedStep:
    """One captured step."""

    def __init__(self, step: "TorchStep") -> None:
        self.step, self.logits = step, step.logits
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # warm up outside of the capture, as torch.cuda.graph asks for
            for _ in range(3):
                step.run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            step.output = step.forward(*step.arguments)

    def run(self) -> None:
        self.graph.replay()
        torch.cuda.synchronize()


class Compiled:
    """Algorithm 1 through torch.compile, on CUDA with CUDA graphs; compiled anew for every shape."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.options = {"mode": "reduce-overhead"} if model.device == "cuda" else {"backend": "aot_eager"}

    def allocate(self, batch: int, capacity: int) -> None:
        torch._dynamo.reset()
        self.model.allocate(batch, capacity)

    def bind(self, ids: npt.NDArray[np.int64], past: int) -> Any:
        return self.model.bind(ids, past, torch.compile(self.model, fullgraph=True, dynamic=False, **self.options))

    def bytes_read(self, batch: int, past: int) -> int:
        return int(self.model.bytes_read(batch, past))


class Launched:
    """A session for CUDA graphs whose every kernel is launched all the same: one session serves both rows."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.allocate, self.bytes_read = decoder, decoder.allocate, decoder.bytes_read

    def bind(self, ids: npt.NDArray[np.int64], past: int) -> OnnxStep:
        return self.decoder.bind(ids, past, graph=False)


def open_models(job: Job, checkpoint: Checkpoint) -> dict[str, Callable[[], Any]]:
    """Runtime -> how to get the model of `job` in it. An artifact is loaded once for all runtimes."""
    decoder: list[Decoder] = []

    def session() -> Decoder:
        if not decoder:
            decoder.append(open_model(job, CUDA_GRAPH if CUDA_GRAPH in job.runtimes else ORT, checkpoint))
        return decoder[0]

    return {
        EAGER: lambda: open_model(job, EAGER, checkpoint),
        GRAPHED: lambda: Graphed(open_model(job, EAGER, checkpoint)),
        COMPILED: lambda: open_model(job, COMPILED, checkpoint),
        ORT: lambda: Launched(session()),
        CUDA_GRAPH: session,
    }


def open_model(job: Job, runtime: str, checkpoint: Checkpoint) -> Any:
    """The model of `job` in `runtime`.

    Raises:
        MemoryError: when its weights are larger than the free memory of the device.
    """
    masks = Masks.load(Path(job.masks)) if job.masks else Masks.dense(checkpoint.config)
    config, itemsize = checkpoint.config, getattr(torch, job.dtype).itemsize
    weights = masks.kept_parameters(config) + (1 if config.tied else 2) * config.vocab_size * config.hidden_size
    require_memory(job.device, weights * itemsize, "weights")
    if job.artifact is not None:
        path = Path(job.artifact) / "model.onnx"
        return Decoder(path, config, threads=1, device=job.device, cuda_graph=runtime == CUDA_GRAPH)
    from algorithm1 import Algorithm1  # the other half of the processes need not wait for transformers

    model = Algorithm1(checkpoint, masks, getattr(torch, job.dtype), job.device)
    return Compiled(model) if runtime == COMPILED else model


def check_logits(model: Any, job: Job, runtime: str, vocabulary: int) -> dict[str, float]:
    """Compare a prompt and a token behind it, batch 2, with what eager PyTorch left in the reference file.

    The token is run three times, so that a CUDA graph is captured and replayed. Both sides round: the limit is twice
    that of dispc validate.

    Raises:
        ArithmeticError: when they differ by more.
    """
    if job.reference is None:
        return {}
    ids = np.random.default_rng(0).integers(0, vocabulary, (2, CHECKED_TOKENS + 1))
    model.allocate(2, CHECKED_TOKENS + 8)
    found = []
    for part, past, repeats in ((ids[:, :-1], 0, 1), (ids[:, -1:], CHECKED_TOKENS, 3)):
        step = model.bind(part, past)
        for _ in range(repeats):
            step.run()
        found.append(step.logits())
    logits, reference = np.concatenate(found, axis=1), Path(job.reference)
    if runtime == EAGER:
        np.save(reference, logits)
        return {}
    if not reference.is_file():
        raise ArithmeticError("no logits of eager PyTorch to compare with, so nothing is timed")
    error, limit = logit_error(logits, np.load(reference)), 2 * LIMITS[job.dtype]
    if not error <= limit:
        raise ArithmeticError(f"logits differ from eager PyTorch's by {error:.1e} of their range, over {limit:.0e}")
    return {"logit_difference": error}


def measure(model: Any, cell: Cell, job: Job, config: DecoderConfig) -> dict[str, Any]:
    """Milliseconds of a call; of ONNX Runtime also the time spent on indexing; for decoding bytes read and their rate.

    Raises:
        MemoryError: when the caches and logits of the cell do not fit.
    """
    decode = cell.phase == "decode"
    past, new = (cell.tokens, 1) if decode else (0, cell.tokens)
    release_memory(job.device)
    widths = 2 * config.num_hidden_layers * config.key_value_size * (past + new)
    widths += new * (config.vocab_size + 4 * config.hidden_size + 3 * config.intermediate_size)
    require_memory(job.device, cell.batch * widths * getattr(torch, job.dtype).itemsize, "caches and activations")
    model.allocate(cell.batch, past + new)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (cell.batch, new))
    step = model.bind(ids, past)
    with turn(job):
        times = alternate({"": step.run}, job.rounds, job.calls)[""]
    found: dict[str, Any] = {"milliseconds": summary(times)}
    found["tokens_per_second"] = round(cell.batch * new / found["milliseconds"]["median"] * 1000, 2)
    if decode:
        found["bytes_read"] = model.bytes_read(cell.batch, past)
        found["gb_per_second"] = round(found["bytes_read"] / found["milliseconds"]["median"] / 10**6, 2)
    if isinstance(model, Launched):
        found["indexing"] = profile_kernels(step) if job.device == "cuda" else profile_nodes(model.decoder, ids, past)
    return found


@contextmanager
def turn(job: Job) -> Iterator[None]:
    """Hold the lock of the jobs that start together: what is timed is timed alone."""
    if job.turns is None:
        yield
        return
    with Path(job.turns).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def profile_kernels(step: OnnxStep) -> dict[str, Any]:
    """Milliseconds per call in CUDA kernels that gather or scatter, and in all; `step` has run before.

    By PyTorch's profiler, which sees every kernel of the process: the published onnxruntime-gpu is built without
    CUPTI, so its own profiler tells how long launches take, not kernels.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_CALLS):
            step.run()
        torch.cuda.synchronize()
    kernels = [(row.key, row.self_device_time_total) for row in profiler.key_averages()]
    return _indexing_share("CUDA kernels", kernels)


def profile_nodes(model: Decoder, ids: npt.NDArray[np.int64], past: int) -> dict[str, Any]:
    """Milliseconds per call in nodes that gather or scatter, and in all, by ONNX Runtime's profiler."""
    with tempfile.TemporaryDirectory() as folder:
        profiled = Decoder(model.path, model.config, threads=1, device=model.device, profile=Path(folder) / "profile")
        profiled.allocate(len(ids), past + ids.shape[1])
        step = profiled.bind(ids, past)
        for _ in range(PROFILED_CALLS + 1):
            step.run()
        events = json.loads(Path(profiled.session.end_profiling()).read_text())
    nodes = [(event["args"]["op_name"], event["dur"]) for event in events if event["name"].endswith("_kernel_time")]
    return _indexing_share("nodes", nodes[len(nodes) // (PROFILED_CALLS + 1) :])  # the first call warms up


def _indexing_share(what: str, microseconds: list[tuple[str, float]]) -> dict[str, Any]:
    every = sum(time for _, time in microseconds)
    indexing = sum(time for name, time in microseconds if any(word in name.lower() for word in INDEXING))
    per_call = 1000 * PROFILED_CALLS
    share = round(indexing / every, 4) if every else None
    return {
        "of": what, "milliseconds": round(indexing / per_call, 4), "all_milliseconds": round(every / per_call, 4),
        "share": share,
    }  # fmt: skip


def copy_rate(device: str) -> float:
    """GB/s of a large copy within the device's memory, bytes read and bytes written together."""
    size = 2 * GIB if device == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * size / min(alternate({"": copy}, 3, 5)[""]) / 10**6


def require_memory(device: str, needed: int, what: str) -> None:
    """Raise MemoryError when `needed` bytes are more than the device has free."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        if needed > free:
            raise MemoryError(f"{what} need about {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free")


def release_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def describe_device(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": device}
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        found = {"name": facts.name, "memory_gib": round(facts.total_memory / GIB, 1), "cuda": torch.version.cuda}
    found["copy_gb_per_second"] = round(copy_rate(device), 1)
    return {"device": found | {"graphics_cards": graphics_cards()}}  # their clocks right behind the copies, not idle


def run_job(job: Job) -> Iterator[dict[str, Any]]:
    """The device, then every planned cell: its figures, why it was skipped, or its error."""
    if job.device == "cpu":
        torch.set_num_threads(1)
    yield describe_device(job.device)
    release_memory(job.device)
    checkpoint = open_checkpoint(Path(job.model))
    config = checkpoint.config
    models = open_models(job, checkpoint)
    for runtime in job.runtimes:
        cells = [cell for name, cell in job.planned() if name == runtime]
        model, checked, failure = None, {}, {}
        try:
            model = models[runtime]()
            checked = check_logits(model, job, runtime, config.vocab_size)
        except Exception as error:  # whatever the runtime raises: it is recorded, and the other cells go on
            failure = _failure(error)
        for cell in cells:
            found = failure or _attempt(lambda m=model, c=cell: measure(m, c, job, config))  # type: ignore[misc]
            yield {"runtime": runtime} | asdict(cell) | found | checked
        model = None
        release_memory(job.device)


def _attempt(measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measured()
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> dict[str, str]:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return {"skipped": str(error)} if isinstance(error, MemoryError) else {"error": text}


if __name__ == "__main__":
    for number, argument in enumerate(sys.argv[1:]):
        for line in run_job(Job.from_json(argument)):
            print(json.dumps({"job": number} | line), flush=True)
        gc.collect()
