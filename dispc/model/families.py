"""The decoder families dispc compiles: one table row each, and the facts of a model that masks and passes need.

A row says where a family keeps its projections and norms (module names relative to a block) and when to refuse a
config. Everything else about a family (activations, biases, scaling, rotary details) is read off the traced model.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dispc.model.norms import LAYER, LAYER_COHERE, LAYER_ONE_PLUS, RMS, RMS_ONE_PLUS, Norm
from dispc.support.errors import UnsupportedModelError

Refusal = tuple[Callable[[Mapping[str, Any]], bool], str]
"""A test of the raw config.json, and the reason given when it holds."""


@dataclass(frozen=True)
class SubLayerNames:
    """Modules of one sub-layer, by their names in its block.

    `before` is the norm whose output the `reads` see (None: they see the residual stream), `write` the projection whose
    rows are written, `behind` the norm between it and the residual add (None: there is none).
    """

    before: str | None
    reads: tuple[str, ...]
    write: str
    behind: str | None


@dataclass(frozen=True)
class Packed:
    """A linear layer that holds several projections, all by their names in the block.

    The rows of the `parts` follow each other as they are listed; with `per_head` they do so within each head.
    """

    module: str
    parts: tuple[str, ...]
    per_head: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a decoder family keeps its parts. Names are those of the transformers implementation.

    The norms in front of the sub-layers are `attention_norm` and `mlp_norm`, those behind them `attention_post_norm`
    and `mlp_post_norm`; None says that there is none. With `scaled_embedding` the embeddings are multiplied by the root
    of their width. What `packed` holds goes by the names of its parts everywhere else (`dispc.model.packed`).

    `rotary` says that queries and keys are rotated by their positions: by the frequencies of base `rope_theta` over the
    first `rotary_share` of each head, where config.json does not say it; `local_rope_theta` is the base of sliding
    blocks in families that have two. `attention` names the implementation of transformers that the reference uses.
    `ignored` are keys of config.json that change nothing in this family.
    """

    model_type: str
    title: str
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    norm: Norm = RMS
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_out: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    packed: tuple[Packed, ...] = ()
    scaled_embedding: bool = False
    intermediate_size: str = "intermediate_size"
    rotary: bool = True
    rope_theta: float = 10_000.0
    rotary_share: float = 1.0
    local_rope_theta: float | None = None
    attention: str = "sdpa"
    ignored: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    def block(self, index: int) -> str:
        """Module name of block `index`, such as `model.layers.3`."""
        return f"{self.layers}.{index}"

    @property
    def attention_names(self) -> SubLayerNames:
        return SubLayerNames(self.attention_norm, self.attention_reads, self.attention_out, self.attention_post_norm)

    @property
    def mlp_names(self) -> SubLayerNames:
        return SubLayerNames(self.mlp_norm, self.mlp_reads, self.down, self.mlp_post_norm)

    @property
    def attention_module(self) -> str:
        """The module of a block that computes attention."""
        return self.query.partition(".")[0]

    @property
    def attention_reads(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    @property
    def mlp_reads(self) -> tuple[str, ...]:
        return (self.gate, self.up) if self.gate else (self.up,)


def _head_size(config: Mapping[str, Any]) -> Any:
    """Hidden size over heads; None where config.json does not say both as numbers."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None


WHOLE_HEADS: tuple[Refusal, ...] = (
    (
        lambda c: c.get("head_dim") not in (None, _head_size(c)),
        "heads of another size than hidden_size / num_attention_heads (head_dim)",
    ),
)
"""For families whose implementation in transformers does not read `head_dim`."""

OPT_REFUSALS: tuple[Refusal, ...] = (
    *WHOLE_HEADS,
    (
        lambda c: not c.get("do_layer_norm_before", True),
        "norms that follow the sub-layers (do_layer_norm_before=false, as in OPT-350M)",
    ),
    (
        lambda c: c.get("word_embed_proj_dim", c.get("hidden_size")) != c.get("hidden_size"),
        "embedding projections (word_embed_proj_dim differs from hidden_size, as in OPT-350M)",
    ),
    (
        lambda c: bool(c.get("_remove_final_layer_norm")) or c.get("layer_norm_elementwise_affine") is False,
        "missing or weightless layer norms (_remove_final_layer_norm, layer_norm_elementwise_affine)",
    ),
)


BIDIRECTIONAL: tuple[Refusal, ...] = (
    (lambda c: bool(c.get("use_bidirectional_attention")), "bidirectional attention (use_bidirectional_attention)"),
)

WINDOW_PATTERN = ("sliding_window_pattern", "_sliding_window_pattern")
"""Every how many blocks of Gemma 3 there is one without a window: its first files say that instead of `layer_types`."""

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama", title="LLaMA, LLaMA-2, LLaMA-3, SmolLM2"),
        Family(model_type="mistral", title="Mistral"),
        Family(model_type="qwen2", title="Qwen2, Qwen2.5"),
        Family(model_type="qwen3", title="Qwen3"),
        Family(
            model_type="phi",
            title="Phi-1.5, Phi-2",
            norm=LAYER,
            mlp_norm="input_layernorm",
            attention_out="self_attn.dense",
            gate=None,
            up="mlp.fc1",
            down="mlp.fc2",
            rotary_share=0.5,
        ),
        Family(
            model_type="opt",
            title="OPT",
            norm=LAYER,
            layers="model.decoder.layers",
            embedding="model.decoder.embed_tokens",
            attention_norm="self_attn_layer_norm",
            mlp_norm="final_layer_norm",
            attention_out="self_attn.out_proj",
            gate=None,
            up="fc1",
            down="fc2",
            intermediate_size="ffn_dim",
            rotary=False,
            refusals=OPT_REFUSALS,
        ),
        Family(model_type="granite", title="Granite 3"),
        Family(
            model_type="smollm3",
            title="SmolLM3",
            rope_theta=2_000_000.0,
            ignored=("max_window_layers",),  # Qwen2's, which published files still name
        ),
        Family(
            model_type="starcoder2",
            title="StarCoder2",
            ignored=(  # GPT-BigCode's, which published files still name
                "mlp_type",
                "norm_type",
                "activation_function",
                "scale_attn_weights",
                "attention_softmax_in_fp32",
                "scale_attention_softmax_in_fp32",
            ),
            refusals=(
                (lambda c: c.get("scale_attn_weights") is False, "unscaled attention (scale_attn_weights=false)"),
                (lambda c: c.get("mlp_type", "default") != "default", "other MLPs (mlp_type)"),
                (lambda c: c.get("norm_type", "layer_norm") != "layer_norm", "other norms (norm_type)"),
            ),
            norm=LAYER,
            gate=None,
            up="mlp.c_fc",
            down="mlp.c_proj",
        ),
        Family(
            model_type="stablelm",
            title="StableLM 2 1.6B, StableLM 3B",
            rotary_share=0.25,
            norm=LAYER,
            refusals=(
                *WHOLE_HEADS,
                (lambda c: bool(c.get("qk_layernorm")), "norms of queries and keys by head (qk_layernorm)"),
                (lambda c: bool(c.get("use_parallel_residual")), "parallel sub-layers (use_parallel_residual)"),
            ),
        ),
        Family(
            model_type="nemotron",
            title="Nemotron, Minitron",
            norm=LAYER_ONE_PLUS,
            gate=None,
            rotary_share=0.5,
            ignored=("kv_channels",),
            refusals=(
                (
                    lambda c: c.get("kv_channels") not in (None, c.get("head_dim") or _head_size(c)),
                    "two sizes of heads (kv_channels differs from head_dim)",
                ),
            ),
        ),
        Family(
            model_type="phi3",
            title="Phi-3, Phi-3.5, Phi-4",
            packed=(
                Packed("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                Packed("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
            ),
        ),
        Family(
            model_type="gpt_neox",
            title="Pythia, GPT-NeoX",
            rotary_share=0.25,
            norm=LAYER,
            layers="gpt_neox.layers",
            embedding="gpt_neox.embed_in",
            head="embed_out",
            query="attention.q_proj",
            key="attention.k_proj",
            value="attention.v_proj",
            attention_out="attention.dense",
            gate=None,
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            packed=(
                Packed(
                    "attention.query_key_value",
                    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                    per_head=True,
                ),
            ),
            refusals=WHOLE_HEADS,
        ),
        Family(
            model_type="cohere",
            title="Command R, Aya",
            norm=LAYER_COHERE,
            mlp_norm="input_layernorm",
            refusals=((lambda c: bool(c.get("use_qk_norm")), "norms of queries and keys by head (use_qk_norm)"),),
        ),
        Family(model_type="gemma", title="Gemma", norm=RMS_ONE_PLUS, scaled_embedding=True, refusals=BIDIRECTIONAL),
        Family(
            model_type="olmo2",
            title="OLMo 2",
            attention_norm=None,
            attention_post_norm="post_attention_layernorm",
            mlp_norm=None,
            mlp_post_norm="post_feedforward_layernorm",
        ),
        Family(
            model_type="gemma2",
            title="Gemma 2",
            ignored=("hidden_act",),  # hidden_activation decides
            attention="eager",  # the others of transformers leave the softcap of attention out
            norm=RMS_ONE_PLUS,
            scaled_embedding=True,
            attention_post_norm="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            mlp_post_norm="post_feedforward_layernorm",
            refusals=BIDIRECTIONAL,
        ),
        Family(
            model_type="gemma3_text",
            title="Gemma 3 (text)",
            rope_theta=1_000_000.0,
            local_rope_theta=10_000.0,
            ignored=("hidden_act", *WINDOW_PATTERN),
            norm=RMS_ONE_PLUS,
            scaled_embedding=True,
            attention_post_norm="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            mlp_post_norm="post_feedforward_layernorm",
            refusals=(
                *BIDIRECTIONAL,
                (
                    lambda c: not c.get("layer_types") and any(c.get(key) not in (None, 6) for key in WINDOW_PATTERN),
                    "other window patterns than 6 without layer_types (sliding_window_pattern)",
                ),
            ),
        ),
    )
}


PER_LAYER = ("layer_types", "no_rope_layers")
"""Options of a config that have one entry for each block."""
NO_ROTARY = " without rotary"
"""Ends the kind of a block whose queries and keys are not rotated, in a family where others are."""


def _rope_type(config: Mapping[str, Any]) -> str:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return str(rope.get("rope_type", rope.get("type", "default"))) if isinstance(rope, Mapping) else "malformed"


COMMON_REFUSALS: tuple[Refusal, ...] = (
    (lambda c: bool(c.get("quantization_config")), "checkpoints that are already quantised"),
    (
        lambda c: _rope_type(c) not in ("default", "linear", "llama3", "yarn"),
        "rotary scalings other than linear, llama3 and yarn (dynamic or longrope depend on the sequence length)",
    ),
)


def supported_models() -> str:
    """The list that refusals print, such as `llama (LLaMA, LLaMA-2), opt (OPT)`."""
    return ", ".join(f"{family.model_type} ({family.title})" for family in FAMILIES.values())


def find_family(config: Mapping[str, Any]) -> Family:
    """The family row of a raw config.json.

    Raises:
        UnsupportedModelError: naming the reason and everything that is supported.
    """
    model_type = str(config.get("model_type", "missing"))
    family = FAMILIES.get(model_type)
    if family is None:
        reason = f"model_type {model_type!r} is not supported"
        if any("expert" in key for key in config):
            reason = f"mixture-of-experts models (model_type {model_type!r}) are not supported"
        elif config.get("auto_map"):
            reason += "; its code would need trust_remote_code, and dispc never runs code from a checkpoint"
        raise UnsupportedModelError(f"{reason}; supported: {supported_models()}")
    for refuses, reason in (*family.refusals, *COMMON_REFUSALS):
        if refuses(config):
            raise UnsupportedModelError(f"{model_type}: {reason} are not supported; supported: {supported_models()}")
    return family


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes of a decoder model, whatever its family calls them.

    `layer_kinds` has one entry per block; blocks of the same kind differ only in weights. Embeddings are multiplied by
    `embedding_multiplier`, the outputs of sub-layers by `residual_multiplier`, those of the LM head by
    `logits_multiplier` (in front of a softcap, if any).
    """

    family: Family
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied: bool
    layer_kinds: tuple[str, ...]
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    parallel: bool = False
    """Both sub-layers of a block read what enters it."""

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "max_positions",
        ):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, a positive integer is expected")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} key/value heads"
            )
        if len(self.layer_kinds) != self.num_hidden_layers:
            raise ValueError(f"layer_types names {len(self.layer_kinds)} of {self.num_hidden_layers} blocks")

    @staticmethod
    def from_pretrained(config: Any, family: Family) -> "DecoderConfig":
        """Read the sizes off a transformers `PretrainedConfig`, which knows each family's defaults.

        Raises:
            AttributeError, TypeError, ValueError, ZeroDivisionError: when a size is missing or makes no sense.
        """
        heads = config.num_attention_heads
        layers = config.num_hidden_layers
        return DecoderConfig(
            family=family,
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, family.intermediate_size),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            tied=bool(config.tie_word_embeddings),
            layer_kinds=_layer_kinds(config, layers),
            embedding_multiplier=config.hidden_size**0.5
            if family.scaled_embedding
            else _number(config, "embedding_multiplier"),
            residual_multiplier=_number(config, "residual_multiplier"),
            logits_multiplier=logits_multiplier(config),
            parallel=family.attention_norm == family.mlp_norm is not None
            or bool(getattr(config, "use_parallel_residual", False)),
        )

    @property
    def templates(self) -> tuple[int, ...]:
        """The first block of each kind, in order."""
        return tuple(self.layer_kinds.index(kind) for kind in dict.fromkeys(self.layer_kinds))

    def rotates(self, index: int) -> bool:
        """Whether block `index` rotates its queries and keys."""
        return self.family.rotary and not self.layer_kinds[index].endswith(NO_ROTARY)

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def outputs(self, projection: str) -> int:
        """Rows of a projection that reads the stream, by its name in the block."""
        family = self.family
        sizes = {family.query: self.query_size, family.key: self.key_value_size, family.value: self.key_value_size}
        return sizes.get(projection, self.intermediate_size)

    @property
    def block_parameters(self) -> int:
        """T of one dense block: its projection weights (biases and norms do not count), as in the paper."""
        attention = self.attention_parameters(self.hidden_size, self.hidden_size)
        return int(attention + self.mlp_parameters(self.hidden_size, self.intermediate_size, self.hidden_size))

    def attention_parameters(self, read: Any, write: Any) -> Any:
        """|S1| (dq + 2 dkv) + |S2| dq, of two integers or of two tensors of widths."""
        return read * (self.query_size + 2 * self.key_value_size) + write * self.query_size

    def mlp_parameters(self, read: Any, mid: Any, write: Any) -> Any:
        """(2 |S3| + |S5|) |S4| for a gated MLP, (|S3| + |S5|) |S4| otherwise; of integers or tensors of widths."""
        return (len(self.family.mlp_reads) * read + write) * mid


def _number(config: Any, name: str) -> float:
    """An option of a config that multiplies or divides; 1 where it is missing or None."""
    value = getattr(config, name, None)
    return 1.0 if value is None else float(value)


def _layer_kinds(config: Any, layers: int) -> tuple[str, ...]:
    kinds = tuple(getattr(config, "layer_types", None) or ("full_attention",) * layers)
    rotates = getattr(config, "no_rope_layers", None)  # named after what its zeros say
    if rotates is None:
        return kinds
    return tuple(kind if rotary else f"{kind}{NO_ROTARY}" for kind, rotary in zip(kinds, rotates, strict=True))


def logits_multiplier(config: Any) -> float:
    """What the outputs of the LM head are multiplied by: Cohere multiplies, Granite and a softcap divide."""
    divisor = _number(config, "logits_scaling") * _number(config, "final_logit_softcapping")
    return _number(config, "logit_scale") / divisor


def keep_blocks(config: Any, chosen: Sequence[int]) -> Any:
    """A copy of a transformers config for a model of some of its blocks."""
    kept = copy.deepcopy(config)
    kept.num_hidden_layers = len(chosen)
    for name in PER_LAYER:
        if getattr(config, name, None) is not None:
            setattr(kept, name, [getattr(config, name)[index] for index in chosen])
    return kept
