"""The runtimes that gpu_cells.py compares: PyTorch eager, captured or compiled; ONNX Runtime, captured or not.

All have the methods `allocate`, `bind` and `bytes_read` of `decoder.Decoder`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from decoder import Decoder, OnnxStep
from gpu_device import require_memory
from gpu_jobs import COMPILED, CUDA_GRAPH, EAGER, GRAPHED, ORT, Job

from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from algorithm1 import TorchStep


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
