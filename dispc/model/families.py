"""The decoder families dispc compiles: one table row each, and the facts of a model that masks and passes need.

A row says where a family keeps its projections and norms (module names relative to a block) and when to refuse a
config. Everything else about a family (activations, biases, scaling, rotary details) is read off the traced model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dispc.support.errors import UnsupportedModelError

Refusal = tuple[Callable[[Mapping[str, Any]], bool], str]
"""A test of the raw config.json, and the reason given when it holds."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a decoder family keeps its parts. Names are those of the transformers implementation.

    `rotary` says that queries and keys are rotated by their positions: by the frequencies of base `rope_theta` over the
    first `rotary_share` of each head, where config.json does not say it; `local_rope_theta` is the base of sliding
    blocks in families that have two. `attention` names the implementation of transformers that the reference uses.
    `ignored` are keys of config.json that change nothing in this family.
    """

    model_type: str
    title: str
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_out: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
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
    def attention_reads(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    @property
    def mlp_reads(self) -> tuple[str, ...]:
        return (self.gate, self.up) if self.gate else (self.up,)


OPT_REFUSALS: tuple[Refusal, ...] = (
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
        "missing or weightless layer norms",
    ),
)

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
    )
}


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

    `layer_kinds` has one entry per block; blocks of the same kind differ only in weights.
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

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "vocab_size", "max_positions"):  # fmt: skip
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
            layer_kinds=tuple(getattr(config, "layer_types", None) or ("full_attention",) * layers),
        )

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

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
