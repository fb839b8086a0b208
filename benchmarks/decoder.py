"""A decoder graph in ONNX Runtime as a server runs it: IOBinding, with past and present in one fixed buffer.

Takes artifacts of dispc and graphs of onnxruntime-genai's builder, with or without `position_ids`. Tokens, caches and
logits are torch tensors, on the CPU or on a GPU.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from dispc.evaluate.perplexity import negative_log_likelihood
from dispc.model.config import DecoderConfig

DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
}
ELEMENTS = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16, torch.int64: 7}
"""ONNX's numbers of element types (TensorProto.DataType); numpy has no bfloat16."""
BY_ROW = {
    "Gather": (0,),
    "GatherBlockQuantized": (0, 2, 3),
    "RotaryEmbedding": (1, 2, 3),
    "GroupQueryAttention": (7, 8),
}
"""Inputs of which a token reads one row: embeddings, cosine and sine tables."""


class Step(Protocol):
    """A run with all its inputs and outputs in place, which can be repeated."""

    def run(self) -> None: ...

    def logits(self) -> npt.NDArray[np.float32]:
        """float32 logits [B,S,V] of the latest run."""


class Model(Protocol):
    """A decoder model in some runtime."""

    def allocate(self, batch: int, capacity: int) -> None:
        """New caches of `capacity` tokens, with random contents."""

    def bind(self, ids: npt.NDArray[np.int64], past: int) -> Step:
        """A run of the tokens [B,S] with `past` tokens in the caches. Call `allocate` first."""

    def bytes_read(self, batch: int, past: int) -> int:
        """Bytes that a decoding step reads."""


class Decoder:
    """A session on `device`, `cpu` or `cuda`. `profile` is where ONNX Runtime's profiler writes.

    Raises:
        RuntimeError: when ONNX Runtime would run on another provider than the one asked for.
    """

    def __init__(
        self,
        path: Path,
        config: DecoderConfig,
        *,
        threads: int = 0,
        device: str = "cpu",
        cuda_graph: bool = False,
        profile: Path | None = None,
    ) -> None:
        import onnxruntime as ort  # after torch, whose CUDA libraries it then finds

        self.path, self.config, self.device, self.cuda_graph = path, config, device, cuda_graph
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # Sessions alternate in one process: none may spin while another is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda":
            ort.preload_dlls()
            cuda = {"enable_cuda_graph": str(int(cuda_graph)), "use_tf32": "0"}
            cuda["arena_extend_strategy"] = "kSameAsRequested"
            providers.insert(0, ("CUDAExecutionProvider", cuda))
        self.session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        if device == "cuda" and self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError("ONNX Runtime fell back to the CPU: its CUDA provider did not load")
        self.types = {value.name: DTYPES[value.type] for value in self.session.get_inputs()}
        self.dtype = next(DTYPES[value.type] for value in self.session.get_outputs() if value.name == "logits")
        shape = next(value.shape for value in self.session.get_outputs() if value.name == "logits")
        self.last_logits = shape[1] == 1
        """Whether the graph gives the logits of a row's last token only."""
        self.caches: dict[str, Tensor] = {}
        self.bound = 0

    def allocate(self, batch: int, capacity: int) -> None:
        """New caches of `capacity` tokens, with random contents."""
        shape = (batch, self.config.num_key_value_heads, capacity, self.config.head_dim)
        self.caches = {
            name: torch.randn(shape, dtype=dtype, device=self.device)
            for name, dtype in self.types.items()
            if name.startswith("past_key_values.")
        }

    def bind(self, ids: npt.NDArray[np.int64], past: int, *, graph: bool = True) -> "OnnxStep":
        """A run of the tokens [B,S] with `past` tokens in the caches, which can be repeated. Call `allocate` first.

        In a CUDA graph the attention mask is as long as the caches and ends in zeros, as in onnxruntime-genai, so that
        one graph serves every step. Without `graph` a session for CUDA graphs launches each kernel.
        """
        self.bound += 1
        captured = graph and self.cuda_graph and ids.shape[1] == 1
        return OnnxStep(self, ids, past, graph_id=self.bound if captured else -1)

    def bytes_read(self, batch: int, past: int) -> int:
        """Bytes that a decoding step reads: each initializer once per node that uses it, and the caches.

        Of tables, one row per sequence counts. A Transpose or Reshape of an initializer is folded when the session is
        made, and counts as the initializer.
        """
        graph = ir.load(self.path).graph
        tables: dict[ir.Value, tuple[int, int]] = {}  # bytes, rows
        for value in graph.initializers.values():
            assert value.const_value is not None
            shape = value.const_value.shape.numpy()
            tables[value] = value.const_value.nbytes, shape[0] if shape else 1
        total = 0
        for node in graph:
            first = node.inputs[0] if node.inputs else None
            if node.op_type in ("Transpose", "Reshape") and first in tables:
                size, rows = tables[first]
                if node.op_type == "Transpose" and first.shape is not None:
                    rows = int(first.shape.numpy()[node.attributes["perm"].as_ints()[0]])
                tables[node.outputs[0]] = size, rows
                continue
            for index, read in enumerate(node.inputs):
                if read in tables:
                    size, rows = tables[read]
                    by_row = index in BY_ROW.get(node.op_type, ())
                    total += batch * size // rows if by_row else size
        caches = [dtype.itemsize for name, dtype in self.types.items() if name.startswith("past_key_values.")]
        return total + batch * past * self.config.key_value_size * sum(caches)


class OnnxStep:
    """One run with all inputs and outputs bound."""

    def __init__(self, decoder: Decoder, ids: npt.NDArray[np.int64], past: int, graph_id: int) -> None:
        import onnxruntime as ort

        self.decoder = decoder
        (batch, tokens), total = ids.shape, past + ids.shape[1]
        capacity = next((cache.shape[2] for cache in decoder.caches.values()), total)
        mask = torch.ones((batch, total), dtype=torch.int64)
        if graph_id >= 0:
            mask = torch.nn.functional.pad(mask, (0, capacity - total))
        positions = torch.arange(past, total).repeat(batch, 1)
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": mask, "position_ids": positions}
        self.inputs = {
            name: value.contiguous().to(decoder.device) for name, value in inputs.items() if name in decoder.types
        }
        self.inputs |= decoder.caches
        shape = (batch, 1 if decoder.last_logits else tokens, decoder.config.vocab_size)
        self.output = torch.empty(shape, dtype=decoder.dtype, device=decoder.device)
        self.options = ort.RunOptions()
        if decoder.cuda_graph:
            self.options.add_run_config_entry("gpu_graph_id", str(graph_id))
        self.binding = decoder.session.io_binding()
        for name, value in self.inputs.items():
            self.binding.bind_input(name, *_described(value))
        for name, value in ({"logits": self.output} | decoder.caches).items():
            self.binding.bind_output(name.replace("past_key_values", "present"), *_described(value))
        if decoder.device == "cuda":
            torch.cuda.synchronize()

    def run(self) -> None:
        self.decoder.session.run_with_iobinding(self.binding, self.options)

    def logits(self) -> npt.NDArray[np.float32]:
        """float32 logits [B,S,V] of the latest run."""
        found: npt.NDArray[np.float32] = self.output.float().cpu().numpy()
        return found


def perplexity(graph: Decoder, texts: npt.NDArray[np.int64]) -> float:
    """Perplexity as in `dispc eval`, on windows of tokens [N,S], of any graph."""
    scored = texts.shape[1] - 1
    graph.allocate(1, scored)
    total = 0.0
    for row in texts:
        step = graph.bind(row[None, :-1], 0)
        step.run()
        total += float(negative_log_likelihood(step.logits()[0], row[1:]).sum())
    return round(float(np.exp(total / texts[:, 1:].size)), 3)


def _described(value: Tensor) -> tuple[str, int, Any, tuple[int, ...], int]:
    return value.device.type, value.device.index or 0, ELEMENTS[value.dtype], tuple(value.shape), value.data_ptr()
