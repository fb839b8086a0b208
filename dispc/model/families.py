"""The decoder families dispc compiles, one table row each, and the configs that are refused.

A row says where a family keeps its projections and norms (module names relative to a block) and when to refuse a
config. Everything else about a family (activations, biases, scaling, rotary details) is read off the traced model.
"""

from collections.abc import Mapping
from typing import Any

from dispc.model.family import Family, Packed, Refusal
from dispc.model.norms import LAYER, LAYER_COHERE, LAYER_ONE_PLUS, RMS_ONE_PLUS
from dispc.support.errors import CheckpointError, UnsupportedModelError


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

GEMMA_REFUSALS: tuple[Refusal, ...] = (
    *BIDIRECTIONAL,
    (
        lambda c: c.get("hidden_activation") == "gelu",
        "activations with the exact gelu (hidden_activation; Gemma's are gelu_pytorch_tanh)",
    ),
)


def _one_activation(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Gemma's activation as `hidden_act`, which every release reads, whichever of the two keys names it.

    Google's first files say "gelu" and mean the tanh approximation: transformers 5 says so in GemmaConfig, and
    transformers 4 computes the exact one.
    """
    settled = {key: value for key, value in raw.items() if key != "hidden_activation"}
    said = [raw[key] for key in ("hidden_activation", "hidden_act") if raw.get(key)]
    meant = ["gelu_pytorch_tanh" if name == "gelu" else name for name in said] or ["gelu_pytorch_tanh"]
    if meant[0] != meant[-1]:
        raise CheckpointError(f"hidden_activation is {said[0]!r}, and hidden_act {said[1]!r}; remove the wrong one")
    return settled | {"hidden_act": meant[0]}


WINDOW_PATTERN = ("sliding_window_pattern", "_sliding_window_pattern")
"""Every how many blocks of Gemma 3 there is one without a window: its first files say that instead of `layer_types`."""

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama", title="LLaMA, LLaMA-2, LLaMA-3, SmolLM2"),
        Family(model_type="mistral", title="Mistral"),
        Family(model_type="qwen2", title="Qwen2, Qwen2.5"),
        Family(model_type="qwen3", title="Qwen3", head_norms=True),
        Family(
            model_type="phi",
            title="Phi-1.5, Phi-2",
            optimum_reads_heads=False,
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
            optimum_reads_heads=False,
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
            rotates_parts=True,
            optimum_reads_heads=False,
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
            refusals=(
                (lambda c: bool(c.get("use_qk_norm")), "norms of queries and keys by head (use_qk_norm)"),
                (lambda c: c.get("rope_interleaved") in (False, 0), "rotations of halves (rope_interleaved)"),
            ),
        ),
        Family(
            model_type="gemma",
            title="Gemma",
            norm=RMS_ONE_PLUS,
            scaled_embedding=True,
            refusals=GEMMA_REFUSALS,
            settle=_one_activation,
        ),
        Family(
            model_type="olmo2",
            title="OLMo 2",
            head_norms=True,
            optimum_reads_heads=False,
            attention_norm=None,
            attention_post_norm="post_attention_layernorm",
            mlp_norm=None,
            mlp_post_norm="post_feedforward_layernorm",
        ),
        Family(
            model_type="gemma2",
            title="Gemma 2",
            optimum_reads_heads=False,
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
            head_norms=True,
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
                (  # transformers reads it, and passes it on to no attention
                    lambda c: c.get("attn_logit_softcapping") is not None,
                    "softcaps of attention (attn_logit_softcapping)",
                ),
                (
                    lambda c: not c.get("layer_types") and any(c.get(key) not in (None, 6) for key in WINDOW_PATTERN),
                    "other window patterns than 6 without layer_types (sliding_window_pattern)",
                ),
            ),
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
