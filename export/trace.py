"""The semantic trace: a transformers model, shallow and without weights, becomes a standard ONNX graph.

The model is built with one block per distinct kind of block, under fake tensors, and exported with torch.export.
Attention, rotary embedding and RMS norm are single operators of ours during the trace, so the graph has one node for
each, and the remaining ATen operators are few enough to translate with the table below. The result is an ordinary ONNX
model (opset 23) that computes what the dense model computes; its initializers are lazy references to the checkpoint.

    input_ids, attention_mask, position_ids, past_key_values.{i}.key/value -> logits, present.{i}.key/value
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dispc.export.translate import translate
from dispc.model.checkpoint import Checkpoint
from dispc.model.pretrained import build_model, model_class
from dispc.model.weights import one_torch_thread

# The operators of the trace. They have shapes and no kernels: nothing is computed under fake tensors.
_library = torch.library.Library("dispc", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, float scale, int window)"
    " -> (Tensor, Tensor, Tensor)",
    "rotary(Tensor x, int heads) -> Tensor",
    "rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor",
):
    _library.define(_schema)  # type: ignore[no-untyped-call]


@torch.library.register_fake("dispc::attention")  # type: ignore[untyped-decorator]
def _attention_shape(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, kv_heads, past, head_dim = past_k.shape
    present = (batch, kv_heads, past + q.shape[1], head_dim)
    return torch.empty_like(q), q.new_empty(present), q.new_empty(present)


@torch.library.register_fake("dispc::rotary")  # type: ignore[untyped-decorator]
def _rotary_shape(x: Tensor, heads: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("dispc::rms_norm")  # type: ignore[untyped-decorator]
def _rms_norm_shape(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)


@dataclass
class Recorder:
    """What the patched model parts need while tracing: the caches come in here, and go out."""

    past: tuple[Tensor, ...] = ()
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rotary: bool = False

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        scaling: float,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """The attention function given to transformers: query, key and value are [B,H,S,D]."""

        def flat(x: Tensor) -> Tensor:
            return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])

        heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
        flat_query, flat_key, flat_value = flat(query), flat(key), flat(value)
        if self.rotary:
            rotary = torch.ops.dispc.rotary
            flat_query, flat_key = rotary(flat_query, heads), rotary(flat_key, kv_heads)
        index = module.layer_idx
        output, *present = torch.ops.dispc.attention(
            flat_query,
            flat_key,
            flat_value,
            self.past[2 * index],
            self.past[2 * index + 1],
            float(scaling),
            options.get("sliding_window") or 0,
        )
        self.present[index] = (present[0], present[1])
        return output.reshape(*output.shape[:2], heads, head_dim), None


class Wrapper(nn.Module):
    """The traced signature: tensors in, tensors out."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        self.traced = model
        self.recorder = recorder

    def forward(self, input_ids: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        self.recorder.past = past
        logits: Tensor = self.traced(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        presents = [tensor for index in sorted(self.recorder.present) for tensor in self.recorder.present[index]]
        return (logits, *presents)


@contextmanager
def semantic_model(config: Any, dtype: torch.dtype) -> Iterator[tuple[nn.Module, Recorder]]:
    """A fake model of `config` whose attention, rotary and norm calls are the operators above."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    recorder = Recorder()
    AttentionInterface.register("dispc", recorder.attend)
    AttentionMaskInterface.register("dispc", lambda *args, **kwargs: None)
    model = build_model(config, dtype, "dispc")
    namespace = vars(sys.modules[type(model).__module__])
    rotate = namespace.get("apply_rotary_pos_emb")
    recorder.rotary = rotate is not None
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = lambda x, m=module: torch.ops.dispc.rms_norm(x, m.weight, m.variance_epsilon)
        elif name.endswith("RotaryEmbedding"):
            module.forward = lambda *args, **kwargs: (None, None)
        elif name == "NewGELUActivation":
            module.forward = lambda x: nn.functional.gelu(x, approximate="tanh")
        elif hasattr(module, "_update_causal_mask"):
            module._update_causal_mask = lambda *args, **kwargs: None
    try:
        if recorder.rotary:  # the queries and keys are rotated inside `attend`
            namespace["apply_rotary_pos_emb"] = lambda q, k, *args, **kwargs: (q, k)
        yield model, recorder
    finally:
        if recorder.rotary:
            namespace["apply_rotary_pos_emb"] = rotate


def rotary_caches(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """cos and sin of every position, each [positions, rotary dimensions / 2], scaling included; None without rotary."""
    config = checkpoint.pretrained_config
    namespace = vars(sys.modules[model_class(config).__module__])
    rotary_class = next((v for k, v in namespace.items() if k.endswith("RotaryEmbedding")), None)
    if rotary_class is None:
        return None
    positions = torch.arange(config.max_position_embeddings)[None]
    rotary = rotary_class(config)
    checkpoint.check_rotary(rotary)
    with one_torch_thread():  # with several, a first call was once seen to give cosines that are off by 1e-4
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].to(dtype).contiguous(), sin[0, :, :half].to(dtype).contiguous()


def trace(checkpoint: Checkpoint, dtype: torch.dtype) -> ir.Model:
    """The dense model of `checkpoint` in `dtype` as ONNX, with one block for each kind (passes.unroll makes the rest).

    Raises:
        CompileError: when the model's code uses an operator that has no row in the translation table.
    """
    program = export_program(checkpoint, dtype)
    return translate(program, checkpoint, dtype, rotary_caches(checkpoint, dtype))


def export_program(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.export.ExportedProgram:
    """torch.export of the shallow model: one block for each distinct kind, in order of first appearance."""
    config = copy.deepcopy(checkpoint.pretrained_config)
    decoder = checkpoint.config
    kinds = list(dict.fromkeys(decoder.layer_kinds))
    config.num_hidden_layers = len(kinds)
    if hasattr(config, "layer_types"):
        config.layer_types = kinds
    with FakeTensorMode(allow_non_fake_inputs=True), semantic_model(config, dtype) as (model, recorder):
        parameters = [name for name, _ in model.named_parameters()]
        ids = torch.zeros(2, 3, dtype=torch.int64)
        cache = torch.zeros(2, decoder.num_key_value_heads, 5, decoder.head_dim, dtype=dtype)
        past = tuple(cache.clone() for _ in range(2 * len(kinds)))
        dynamic = torch.export.Dim.DYNAMIC
        tokens, caches = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
        program = torch.export.export(
            Wrapper(model, recorder),
            (ids, ids.clone(), *past),
            strict=False,
            dynamic_shapes=(tokens, tokens, (caches,) * len(past)),
        )
    checkpoint.require_places(parameters)
    return program
