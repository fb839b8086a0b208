"""A decoder whose inputs and outputs stay where the model runs: IO binding, shared buffers, CUDA graphs."""

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir

from dispc.runtime.ort import ort
from dispc.runtime.session import Artifact
from dispc.support.arrays import Array, Tokens
from dispc.support.dtypes import BY_ORT
from dispc.support.errors import ArtifactError, first_line

_graph_ids = itertools.count(1)  # ONNX Runtime keeps a session's graphs by number, 0 being for those without one


class BoundDecoder:
    """Feeds an artifact through IO binding.

    `shared`: past and present are one buffer of `capacity` positions, which only GroupQueryAttention with right padding
    takes; the attention mask of a single step is then as long as the buffer. Without it each call's present is the next
    call's past, where ONNX Runtime put it. `graph`: single steps are captured as a CUDA graph on the first and replayed
    after; every address then stays the same.
    """

    def __init__(
        self, artifact: Artifact, *, batch: int, capacity: int, shared: bool, graph: bool = False, session: Any = None
    ) -> None:
        if graph and (not shared or artifact.provider.graph_options is None):
            raise ArtifactError("a CUDA graph needs a shared buffer, and a provider that captures graphs")
        self.session = session or artifact.session
        self.runner = artifact.runner
        self.batch, self.capacity, self.shared, self.graph = batch, capacity, shared, graph
        self.device = artifact.provider.device
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.logits_type = next(v.type for v in self.session.get_outputs() if v.name == "logits")
        self.graph_id = str(next(_graph_ids))
        self.kept: dict[tuple[str, tuple[int, ...]], Any] = {}
        self.reset()

    def reset(self) -> None:
        """Forget every token. Shared buffers stay where they are."""
        self.length = 0
        if not self.shared or not hasattr(self, "caches"):
            self.caches = {name: self._cache(name) for name in self.runner.caches}

    def feed(self, ids: Tokens) -> Array:
        """float32 logits [B,S,V] of the next tokens [B,S]."""
        self.prepare(ids)
        self.run()
        self.advance()
        logits = self.binding.get_outputs()[self.outputs.index("logits")]
        array: Array = logits.numpy()
        return array.astype(np.float32)

    def prepare(self, ids: Tokens) -> None:
        """Bind `ids` and everything else; `run` may then be called any number of times with the same effect."""
        step = ids.shape[1] == 1 and self.length > 0
        past, self.new = self.length, ids.shape[1]
        width = self.capacity if self.shared and step else past + self.new
        mask = np.zeros((self.batch, width), dtype=np.int64)
        mask[:, : past + self.new] = 1
        positions = np.broadcast_to(np.arange(past, past + self.new), ids.shape)
        self.binding = self.session.io_binding()
        for name, value in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)):
            if name in self.runner.inputs:
                self.binding.bind_ortvalue_input(name, self._on_device(name, np.ascontiguousarray(value)))
        for name, cache in self.caches.items():
            self.binding.bind_ortvalue_input(name, cache)
        for name in self.outputs:
            past_name = name.replace("present.", "past_key_values.")
            if self.shared and past_name in self.caches:
                self.binding.bind_ortvalue_output(name, self.caches[past_name])
            elif self.graph and name == "logits":
                self.binding.bind_ortvalue_output(name, self._logits(ids.shape))
            else:
                self.binding.bind_output(name, self.device)
        self.options = ort.RunOptions()
        if self.graph:  # -1: neither capture nor replay
            self.options.add_run_config_entry("gpu_graph_id", self.graph_id if step else "-1")

    def run(self) -> None:
        """One run of what is bound.

        Raises:
            ArtifactError: when ONNX Runtime fails.
        """
        try:
            self.session.run_with_iobinding(self.binding, self.options)
            self.binding.synchronize_outputs()
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ArtifactError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error

    def advance(self) -> None:
        """Take what the last run wrote as the past of the next."""
        self.length += self.new
        if not self.shared:
            values = dict(zip(self.outputs, self.binding.get_outputs(), strict=True))
            self.caches = {name: values[name.replace("past_key_values.", "present.")] for name in self.caches}

    def _cache(self, name: str) -> Any:
        value = self.runner.inputs[name]
        shape = [self.batch, value.shape[1], self.capacity if self.shared else 0, value.shape[3]]
        element = BY_ORT[value.type].onnx
        if element == ir.DataType.BFLOAT16:
            return ort.OrtValue.ortvalue_from_shape_and_type(shape, int(element), self.device)
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=element.numpy()), self.device)

    def _on_device(self, name: str, value: Array) -> Any:
        """`value` on the device; in a CUDA graph at the address that this name and shape always have."""
        if not self.graph:
            return ort.OrtValue.ortvalue_from_numpy(value, self.device)
        key = (name, value.shape)
        if key not in self.kept:
            self.kept[key] = ort.OrtValue.ortvalue_from_numpy(value, self.device)
        self.kept[key].update_inplace(value)
        return self.kept[key]

    def _logits(self, shape: tuple[int, ...]) -> Any:
        """Room for the logits of token ids of this shape [B,S]: of every token, or of the last (`--last-logits`)."""
        _, positions, vocabulary = next(v.shape for v in self.session.get_outputs() if v.name == "logits")
        room = (shape[0], positions if isinstance(positions, int) else shape[1], vocabulary)
        key = ("logits", room)
        if key not in self.kept:
            element = BY_ORT[self.logits_type].onnx
            self.kept[key] = ort.OrtValue.ortvalue_from_shape_and_type(list(room), int(element), self.device)
        return self.kept[key]
