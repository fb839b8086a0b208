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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from common import summary
from decoder import Decoder, Model, Step
from gpu_device import describe_device, release_memory, require_memory
from gpu_jobs import EAGER, Cell, Job
from gpu_runtimes import Launched, open_models

from dispc.model.config import DecoderConfig
from dispc.model.published import open_checkpoint
from dispc.runtime.timing import alternate
from dispc.validate.checks.parity import LIMITS, logit_error

CHECKED_TOKENS = 16
PROFILED_CALLS = 5
INDEXING = ("gather", "scatter")


def check_logits(model: Model, job: Job, runtime: str, vocabulary: int) -> dict[str, float]:
    """Compare the logits of a prefill and of a decoding step, batch 2, with eager PyTorch's in the reference file.

    The step runs three times, so that a CUDA graph is captured and replayed. Both sides round, so the limit is twice
    that of `dispc validate`.

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


def measure(model: Model, cell: Cell, job: Job, config: DecoderConfig) -> dict[str, Any]:
    """Milliseconds of a call; for decoding the bytes read and their rate; in ONNX Runtime the time spent on indexing.

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
    """Hold the lock that jobs share which run at the same time: only one of them is timed at once."""
    if job.turns is None:
        yield
        return
    with Path(job.turns).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def profile_kernels(step: Step) -> dict[str, Any]:
    """Milliseconds per call in CUDA kernels that gather or scatter, and in all; `step` has run before.

    Measured by PyTorch's profiler, which sees every kernel of the process: the published onnxruntime-gpu is built
    without CUPTI, so that its own profiler measures launches, not kernels.
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
    return {
        "of": what,
        "milliseconds": round(indexing / per_call, 4),
        "all_milliseconds": round(every / per_call, 4),
        "share": round(indexing / every, 4) if every else None,
    }


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
