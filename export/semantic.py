"""The operators that stand for a decoder's parts during the trace, and how a transformers model is made to call them.

Attention, rotary embedding and norms become one operator each. They have shapes and no kernels: nothing is computed
under fake tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dispc.model.norms import Norm
from dispc.model.packed import Pack
from dispc.model.weights import one_torch_thread
from dispc.support.errors import CompileError

_library = torch.library.Library("dispc", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, float scale, int window, float softcap)"
    " -> (Tensor, Tensor, Tensor)",
    "rotary(Tensor x, int heads, int table) -> Tensor",
    "norm(Tensor x, Tensor weight, Tensor? bias, float epsilon, bool layer, float offset) -> Tensor",
):
    _library.define(_schema)  # type: ignore[no-untyped-call]


@torch.library.register_fake("dispc::attention")  # type: ignore[untyped-decorator]
def _attention_shape(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, kv_heads, past, head_dim = past_k.shape
    present = (batch, kv_heads, past + q.shape[1], head_dim)
    return torch.empty_like(q), q.new_empty(present), q.new_empty(present)


@torch.library.register_fake("dispc::rotary")  # type: ignore[untyped-decorator]
def _rotary_shape(x: Tensor, heads: int, table: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("dispc::norm")  # type: ignore[untyped-decorator]
def _norm_shape(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, layer: bool, offset: float) -> Tensor:
    return torch.empty_like(x)


OPTIONS = {"sliding_window": None, "softcap": None, "is_causal": True}
"""Options of an attention function that change what it computes, and the values that change nothing.

The first two are read, the third is refused.
"""
IGNORED = {
    "dropout",
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "head_mask",
    "cache_position",
    "past_key_values",
}
"""Options that change nothing without training and cache objects, where the mask is ours."""


@dataclass(frozen=True)
class RotaryTables:
    """cos and sin of every position, each [positions, rotary dimensions / 2], scaling included.

    `interleaved` says that neighbours are rotated together, not the two halves of a head.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


@dataclass(frozen=True)
class Rotation:
    """A call of a model's rotary module: which module, and its arguments besides the positions."""

    module_class: type
    config: Any
    more: tuple[Any, ...]

    def tables(self, dtype: torch.dtype) -> RotaryTables:
        """The module's output for every position of the model."""
        positions = torch.arange(self.config.max_position_embeddings)[None]
        with one_torch_thread():  # with several, a first call was once seen to give cosines that are off by 1e-4
            cos, sin = (x[0] for x in self.module_class(self.config)(torch.zeros(1), positions, *self.more))
        half = cos.shape[-1] // 2
        interleaved = not torch.equal(cos[:, :half], cos[:, half:])
        kept = slice(0, None, 2) if interleaved else slice(0, half)
        return RotaryTables(cos[:, kept].to(dtype).contiguous(), sin[:, kept].to(dtype).contiguous(), interleaved)


@dataclass
class Recorder:
    """State of the patched model parts while tracing: the caches that come in and go out.

    `rotations` are those used so far; one that was requested belongs to the next attention.
    """

    past: tuple[Tensor, ...] = ()
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rotations: list[Rotation] = field(default_factory=list)
    rotation: Rotation | None = None

    def rotary(self, module: Any, x: Tensor, position_ids: Tensor, *more: Any, **named: Any) -> tuple[Any, Any]:
        """In the place of a rotary module's forward: what it gives is recognised by `rotate`."""
        rotation = Rotation(type(module), module.config, (*more, *named.values()))
        return rotation, rotation

    def rotate(self, query: Tensor, key: Tensor, cos: Rotation, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """In the place of `apply_rotary_pos_emb`: `attend` rotates, where the heads are whole."""
        self.rotation = cos
        return query, key

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """The attention function given to transformers: query, key and value are [B,H,S,D].

        Raises:
            CompileError: for an option that would change the result and is not known.
        """
        _refuse_unread(options)
        heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
        flat_query, flat_key, flat_value = (_flat(x) for x in (query, key, value))
        if self.rotation is not None:
            if self.rotation not in self.rotations:
                self.rotations.append(self.rotation)
            table = self.rotations.index(self.rotation)
            flat_query = torch.ops.dispc.rotary(flat_query, heads, table)
            flat_key = torch.ops.dispc.rotary(flat_key, kv_heads, table)
            self.rotation = None
        index = len(self.present)
        output, *present = torch.ops.dispc.attention(
            flat_query,
            flat_key,
            flat_value,
            self.past[2 * index],
            self.past[2 * index + 1],
            float(head_dim**-0.5 if scaling is None else scaling),
            options.get("sliding_window") or 0,
            float(options.get("softcap") or 0.0),
        )
        self.present[index] = (present[0], present[1])
        return output.reshape(*output.shape[:2], heads, head_dim), None

    def attend_scaled(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """In the place of torch's `scaled_dot_product_attention`, whose result is [B,H,S,D]; the mask is ours.

        `enable_gqa` is not read: the operator repeats keys and values as the heads ask for it.

        Raises:
            CompileError: for a mask of the model's own, for dropout, and for attention that sees later tokens.
        """
        if attn_mask is not None or dropout_p or not is_causal:
            raise CompileError(
                "scaled_dot_product_attention is called in a way that the trace does not know: "
                f"is_causal={is_causal}, dropout_p={dropout_p}{'' if attn_mask is None else ', with a mask'}"
            )
        return self.attend(None, query, key, value, None, scale)[0].transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """[B,H,S,D] as [B,S,H*D]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def _refuse_unread(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        known = name in IGNORED or (name in OPTIONS and (name != "is_causal" or value is not False))
        if not known and value is not None:
            raise CompileError(f"attention takes an option that is not known to the trace: {name}={value!r}")


def install(model: nn.Module, norm: Norm, recorder: Recorder) -> None:
    """Let the modules of a fake model call the operators above."""
    for module in model.modules():
        name = type(module).__name__
        if norm.describes(module):
            module.forward = partial(_norm, norm, module)
        elif isinstance(module, Pack):
            vars(module)["forward"] = partial(_parts, module)
        elif name.endswith("RotaryEmbedding"):
            module.forward = partial(recorder.rotary, module)
        elif name == "NewGELUActivation":
            module.forward = partial(nn.functional.gelu, approximate="tanh")
        elif hasattr(module, "_update_causal_mask"):
            vars(module)["_update_causal_mask"] = lambda *args, **kwargs: None


def _parts(pack: Pack, x: Tensor) -> "Parts":
    return Parts([part(x) for part in pack.parts])


class Parts:
    """Outputs of separate projections, which a model's code splits as if they were one tensor.

    Raises:
        CompileError: when it splits them elsewhere than between two of them.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, key: tuple[Any, slice]) -> Tensor:
        ends = [0, *accumulate(tensor.shape[-1] for tensor in self.tensors)]
        wanted = key[1].indices(ends[-1])[:2]
        for tensor, piece in zip(self.tensors, pairwise(ends), strict=True):
            if piece == wanted:
                return tensor
        raise CompileError(f"a packed projection is cut at {wanted}, its parts are cut at {ends}")

    def chunk(self, count: int, dim: int) -> list[Tensor]:
        if count != len(self.tensors) or dim != -1:
            raise CompileError(f"a packed projection of {len(self.tensors)} parts is cut into {count}")
        return self.tensors

    def view(self, shape: tuple[int, ...]) -> "Parts":
        return Parts([tensor.view(*shape[:-1], shape[-1] // len(self.tensors)) for tensor in self.tensors])

    def transpose(self, first: int, second: int) -> "Parts":
        return Parts([tensor.transpose(first, second) for tensor in self.tensors])


def _norm(norm: Norm, module: Any, x: Tensor) -> Tensor:
    bias = getattr(module, "bias", None)
    y: Tensor = torch.ops.dispc.norm(x, module.weight, bias, norm.epsilon_of(module), norm.kind == "layer", norm.offset)
    return y


def functions(recorder: Recorder) -> dict[str, Callable[..., Any]]:
    """What stands in the place of functions of a family's modelling file and of torch, by their names.

    The last two are for attention classes that do not use the interface of transformers.
    """
    return {
        "apply_rotary_pos_emb": recorder.rotate,
        "scaled_dot_product_attention": recorder.attend_scaled,
        "repeat_kv": lambda states, count: states,
    }
