"""The runtimes that gpu_cells.py compares: PyTorch eager, captured or compiled; ONNX Runtime, captured or not.

All have the methods `allocate`, `bind` and `bytes_read` of `decoder.Decoder`.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from decoder import Decoder, Model, OnnxStep
from gpu_device import require_memory
from gpu_jobs import COMPILED, CUDA_GRAPH, EAGER, GRAPHED, ORT, Job

from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.config import DecoderConfig

if TYPE_CHECKING:
    from algorithm1 import Algorithm1, TorchStep


class Graphed:
    """Algorithm 1, its kernels captured in a CUDA graph: the same work without the launches."""

    def __init__(self, model: "Algorithm1") -> None:
        self.model = model

    def allocate(self, batch: int, capacity: int) -> None:
        self.model.allocate(batch, capacity)

    def bind(self, ids: npt.NDArray[np.int64], past: int) -> "GraphedStep":
        return GraphedStep(self.model.bind(ids, past))

    def bytes_read(self, batch: int, past: int) -> int:
        return self.model.bytes_read(batch, past)


class GraphedStep:
    """One captured step."""

    def __init__(self, step: "TorchStep") -> None:
        self.step = step
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):  # warm-up outside of the capture, which torch.cuda.graph requires
            for _ in range(3):
                step.run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            step.output = step.forward(*step.arguments)

    def run(self) -> None:
        self.graph.replay()
        torch.cuda.synchronize()

    def logits(self) -> npt.NDArray[np.float32]:
        return self.step.logits()


class Compiled:
    """Algorithm 1 through torch.compile, on CUDA with CUDA graphs; recompiled for every shape."""

    def __init__(self, model: "Algorithm1") -> None:
        self.model = model

    def allocate(self, batch: int, capacity: int) -> None:
        torch._dynamo.reset()
        self.model.allocate(batch, capacity)

    def bind(self, ids: npt.NDArray[np.int64], past: int) -> "TorchStep":
        options = {"mode": "reduce-overhead"} if self.model.device == "cuda" else {"backend": "aot_eager"}
        compiled = torch.compile(self.model, fullgraph=True, dynamic=False, **options)  # type: ignore[call-overload]
        return self.model.bind(ids, past, compiled)

    def bytes_read(self, batch: int, past: int) -> int:
        return self.model.bytes_read(batch, past)


class Launched:
    """A session for CUDA graphs that launches every kernel, so that one session serves both rows."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def allocate(self, batch: int, capacity: int) -> None:
        self.decoder.allocate(batch, capacity)

    def bind(self, ids: npt.NDArray[np.int64], past: int) -> OnnxStep:
        return self.decoder.bind(ids, past, graph=False)

    def bytes_read(self, batch: int, past: int) -> int:
        return self.decoder.bytes_read(batch, past)


def open_models(job: Job, checkpoint: Checkpoint) -> dict[str, Callable[[], Model]]:
    """Runtime -> a function that opens the model of `job` in it. An artifact is loaded once for all runtimes.

    The functions raise MemoryError when the weights are larger than the free memory of the device.
    """
    session = cache(partial(open_session, job, checkpoint))
    return {
        EAGER: lambda: open_pytorch(job, checkpoint),
        GRAPHED: lambda: Graphed(open_pytorch(job, checkpoint)),
        COMPILED: lambda: Compiled(open_pytorch(job, checkpoint)),
        ORT: lambda: Launched(session()),
        CUDA_GRAPH: session,
    }


def open_session(job: Job, checkpoint: Checkpoint) -> Decoder:
    """The artifact of `job` in ONNX Runtime."""
    require_room(job, checkpoint.config, masks_of(job, checkpoint.config))
    assert job.artifact is not None
    path, captured = Path(job.artifact) / "model.onnx", CUDA_GRAPH in job.runtimes
    return Decoder(path, checkpoint.config, threads=1, device=job.device, cuda_graph=captured)


def open_pytorch(job: Job, checkpoint: Checkpoint) -> "Algorithm1":
    """The model of `job` in PyTorch."""
    from algorithm1 import Algorithm1  # processes that run ONNX Runtime need not wait for transformers

    masks = masks_of(job, checkpoint.config)
    require_room(job, checkpoint.config, masks)
    return Algorithm1(checkpoint, masks, getattr(torch, job.dtype), job.device)


def masks_of(job: Job, config: DecoderConfig) -> Masks:
    return Masks.load(Path(job.masks)) if job.masks else Masks.dense(config)


def require_room(job: Job, config: DecoderConfig, masks: Masks) -> None:
    """Raise MemoryError when the weights are larger than the free memory of the device."""
    weights = masks.kept_parameters(config) + (1 if config.tied else 2) * config.vocab_size * config.hidden_size
    require_memory(job.device, weights * getattr(torch, job.dtype).itemsize, "weights")
