"""An artifact in ONNX Runtime: tokens in, logits and caches out, padded on the side that the artifact declares."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from dispc.errors import ArtifactError
from dispc.manifest import read_manifest

Array = npt.NDArray[Any]
Tokens = npt.NDArray[np.int64]


class Artifact:
    """A loaded artifact.

    bfloat16 graphs, and float16 graphs with ScatterND(add), have no CPU kernels: on the CPU they are run with every
    weight widened to float32 (`widened` says so); that keeps the rounding of the weights, not that of the arithmetic.
    With `exact`, a graph with int8 activations is run with floating-point ones, whose results can be compared closely.

    Raises:
        ArtifactError: when the directory is no artifact, or ONNX Runtime cannot load it.
    """

    def __init__(self, directory: Path, threads: int = 0, *, exact: bool = False) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        self.padding: str = self.manifest["padding"]
        self.dtype: str = self.manifest["dtype"]
        self.positions: int = self.manifest["positions"]
        self.stop_tokens = frozenset(self.manifest["stop_tokens"])
        half_scatter = self.dtype != "float32" and self.manifest["lowering"]["name"] == "canonical"
        self.widened = self.dtype == "bfloat16" or half_scatter
        path = directory / "model.onnx"
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file")
        self.int8_activations = bool((self.manifest.get("quantisation") or {}).get("int8_activations"))
        if self.widened or (exact and self.int8_activations):
            with tempfile.TemporaryDirectory(prefix="dispc-widened-") as scratch:
                wide = Path(scratch) / "model.onnx"
                change = widen if self.widened else without_int8_activations
                ir.save(change(ir.load(path)), wide, external_data="model.onnx.data")
                self.session = open_session(wide, threads=threads)
        else:
            self.session = open_session(path, threads=threads)
        self.runner = Runner(self.session)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Array, "State"]:
        """Run prompts of any lengths as one batch; logits [B,V] of each row's last token, and the state to go on."""
        lengths = np.array([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        ids, mask = np.zeros((2, len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            where = slice(width - len(prompt), width) if self.padding == "left" else slice(0, len(prompt))
            ids[row, where], mask[row, where] = prompt, 1
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        logits, caches = self.runner.run(ids, mask, positions, self.runner.empty_caches(len(prompts)))
        state = State(caches, mask, lengths)
        last = np.full(len(prompts), width - 1) if self.padding == "left" else lengths - 1
        return logits[np.arange(len(prompts)), last], state

    def step(self, tokens: Tokens, state: "State") -> tuple[Array, "State"]:
        """Feed one token [B] per row behind `state`; logits [B,V] and the next state."""
        lengths = state.lengths + 1
        if self.padding == "left":
            mask = np.concatenate([state.mask, np.ones((len(tokens), 1), dtype=np.int64)], axis=1)
        else:  # a row's tokens are the first `length` positions of its cache
            total = state.mask.shape[1] + 1
            mask = (np.arange(total)[None] < lengths[:, None]).astype(np.int64)
        logits, caches = self.runner.run(tokens[:, None], mask, (lengths - 1)[:, None], state.caches)
        return logits[:, -1], State(caches, mask, lengths)


@dataclass(frozen=True)
class State:
    """What a batch carries from step to step: caches, attention mask [B,T], and tokens seen per row."""

    caches: dict[str, Array]
    mask: Tokens
    lengths: npt.NDArray[np.int64]


class Runner:
    """Feeds a session by the names of the artifact's interface."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = {value.name: value for value in session.get_inputs()}
        self.outputs = [value.name for value in session.get_outputs()]

    def empty_caches(self, batch: int) -> dict[str, Array]:
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            name: np.zeros((batch, value.shape[1], 0, value.shape[3]), dtype=types[value.type])
            for name, value in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def run(
        self, ids: Tokens, mask: Tokens, positions: Tokens, caches: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """float32 logits [B,S,V], and the caches for the next call.

        Raises:
            ArtifactError: when ONNX Runtime fails.
        """
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | caches
        try:
            results = self.session.run(None, {name: value for name, value in feeds.items() if name in self.inputs})
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ArtifactError(f"ONNX Runtime cannot run the model: {str(error).splitlines()[0]}") from error
        named = dict(zip(self.outputs, results, strict=True))
        logits = named.pop("logits").astype(np.float32)
        return logits, {name.replace("present.", "past_key_values."): value for name, value in named.items()}


def open_session(path: Path, *, optimise: bool = True, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        ArtifactError: when the model cannot be loaded.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if not threads:  # nobody times this session: let waiting threads sleep, others may want the cores
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise ArtifactError(f"{path}: ONNX Runtime cannot load the model: {str(error).splitlines()[0]}") from error


def widen(model: ir.Model) -> ir.Model:
    """Turn every half-precision tensor and type of `model` into float32, in place."""
    halves, wide = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16), ir.DataType.FLOAT
    graph = model.graph
    for value in _values(graph):
        if value.const_value is not None and value.const_value.dtype in halves:
            narrow = value.const_value
            value.const_value = ir.LazyTensor(
                partial(_as_float32, narrow), dtype=wide, shape=ir.Shape(narrow.shape.numpy()), name=narrow.name
            )
        if value.dtype in halves:
            value.dtype = wide
    for node in graph:
        target = node.attributes.get("to")
        if target is not None and target.as_int() in halves:
            node.attributes["to"] = ir.AttrInt64("to", wide)
    return model


def without_int8_activations(model: ir.Model) -> ir.Model:
    """Let every MatMulNBits of `model` multiply in floating point, in place."""
    for node in model.graph:
        node.attributes.pop("accuracy_level", None)
    return model


def _as_float32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
