"""The semantic trace: a transformers model, shallow and without weights, becomes a standard ONNX graph.

The model is built with one block per distinct kind of block, under fake tensors, and exported with torch.export.
Attention, rotary embedding and norms are single operators of ours during the trace, so the graph has one node for
each, and the remaining ATen operators are few enough to translate with the table in `export/operators.py`. The result
is an ordinary ONNX model (opset 23) that computes what the dense model computes; its initializers are lazy references
to the checkpoint.

    input_ids, attention_mask, position_ids, past_key_values.{i}.key/value -> logits, present.{i}.key/value
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dispc.export.semantic import Recorder, Rotation, functions, install
from dispc.export.translate import translate
from dispc.model.checkpoint import Checkpoint
from dispc.model.config import DecoderConfig, keep_blocks
from dispc.model.packed import separate
from dispc.model.pretrained import build_model, model_class


class Wrapper(nn.Module):
    """The traced signature: tensors in, tensors out."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        self.traced = model
        self.recorder = recorder

    def forward(self, input_ids: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        self.recorder.past, self.recorder.present = past, {}
        logits: Tensor = self.traced(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        presents = [tensor for index in sorted(self.recorder.present) for tensor in self.recorder.present[index]]
        return (logits, *presents)


@contextmanager
def semantic_model(config: Any, decoder: DecoderConfig, dtype: torch.dtype) -> Iterator[tuple[nn.Module, Recorder]]:
    """A fake model of `config` whose attention, rotary and norm calls are the operators of `dispc.export.semantic`."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    recorder = Recorder()
    namespace = vars(sys.modules[model_class(config).__module__])
    for name, classes in namespace.items():  # transformers 4 has families that do not use the interface
        if name.endswith("ATTENTION_CLASSES"):
            classes["dispc"] = classes["sdpa"]
    AttentionInterface.register("dispc", recorder.attend)
    AttentionMaskInterface.register("dispc", lambda *args, **kwargs: None)
    model = build_model(config, dtype, "dispc")
    separate(model, decoder)
    install(model, decoder.family.norm, recorder)
    with ExitStack() as stack:
        for name, stand_in in functions(recorder).items():
            for place in (namespace, vars(nn.functional)):
                if name in place:
                    stack.callback(place.__setitem__, name, place[name])
                    place[name] = stand_in
        yield model, recorder


def trace(checkpoint: Checkpoint, dtype: torch.dtype) -> ir.Model:
    """The dense model of `checkpoint` in `dtype` as ONNX, with one block for each kind: `unroll` makes the rest.

    Raises:
        CompileError: when the model's code uses an operator that has no row in the translation table.
    """
    exported = export_program(checkpoint, dtype)
    tables = [rotation.tables(dtype) for rotation in exported.rotations]
    return translate(exported.program, checkpoint, dtype, tables)


@dataclass(frozen=True)
class Exported:
    """The program of a shallow model, its rotations by the numbers that the program has for them, and what it was made
    of: the names of its parameters, and the class and config of each of its rotary modules."""

    program: torch.export.ExportedProgram
    rotations: Sequence[Rotation]
    parameters: Sequence[str]
    rotaries: Sequence[tuple[type[nn.Module], Any]]


EXPORTED: dict[tuple[str, torch.dtype], Exported] = {}
"""The latest, by their config and dtype: nothing else of a checkpoint has a bearing on them. Validation needs the one
that compiling made, and the demo compiles several artifacts of one config."""
KEPT = 8


def export_program(checkpoint: Checkpoint, dtype: torch.dtype) -> Exported:
    """torch.export of the shallow model: one block for each distinct kind, in order of first appearance.

    Raises:
        CheckpointError: when a tensor has no place in it, or transformers reads the rotary positions in another way.
    """
    config = keep_blocks(checkpoint.pretrained_config, checkpoint.config.templates)
    said = config.to_dict() | {"_name_or_path": ""}  # where the model lies changes nothing
    key = json.dumps(said, sort_keys=True, default=str), dtype
    exported = EXPORTED.pop(key, None) or _export(config, checkpoint.config, dtype)
    EXPORTED[key] = exported  # the latest is the last
    if len(EXPORTED) > KEPT:
        del EXPORTED[next(iter(EXPORTED))]
    checkpoint.require_places(exported.parameters)
    checkpoint.check_rotary(nn.ModuleList(kind(config) for kind, config in exported.rotaries))
    return exported


def _export(config: Any, decoder: DecoderConfig, dtype: torch.dtype) -> Exported:
    """The same of the shallow `config`, for which `decoder` has the sizes."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        semantic_model(config, decoder, dtype) as (model, recorder),
    ):
        parameters = [name for name, _ in model.named_parameters()]
        rotaries = [(type(m), m.config) for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
        ids = torch.zeros(2, 3, dtype=torch.int64)
        cache = torch.zeros(2, decoder.num_key_value_heads, 5, decoder.head_dim, dtype=dtype)
        past = tuple(cache.clone() for _ in range(2 * config.num_hidden_layers))
        dynamic = torch.export.Dim.DYNAMIC
        tokens, caches = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
        program = torch.export.export(
            Wrapper(model, recorder),
            (ids, ids.clone(), *past),
            strict=False,
            dynamic_shapes=(tokens, tokens, (caches,) * len(past)),
        )
    return Exported(program, recorder.rotations, parameters, rotaries)
