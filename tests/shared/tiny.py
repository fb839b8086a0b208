"""Tiny random models of every family, as checkpoint directories. Names of the variants say what is special."""

from pathlib import Path
from typing import Any

import torch

LLAMA: dict[str, Any] = dict(
    hidden_size=48,
    intermediate_size=88,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=131,
    max_position_embeddings=160,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.2,
)
PHI = {k: v for k, v in LLAMA.items() if k != "head_dim"} | dict(
    hidden_size=64, num_key_value_heads=4, partial_rotary_factor=0.5, hidden_act="gelu_new"
)
OPT: dict[str, Any] = dict(
    hidden_size=64,
    ffn_dim=88,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=131,
    init_std=0.2,
    max_position_embeddings=160,
    word_embed_proj_dim=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LINEAR_ROPE = dict(rope_type="linear", factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=40)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
    rope_theta=10000.0,
)

STARCODER2 = LLAMA | dict(hidden_size=64, use_bias=True, sliding_window=7)
STABLELM = LLAMA | dict(hidden_size=64, partial_rotary_factor=0.5, use_qkv_bias=True)
NEOX: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=88,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=131,
    rotary_pct=0.25,
    max_position_embeddings=160,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.2,
)
GRANITE = LLAMA | dict(embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.3, logits_scaling=2.5)
GEMMA = LLAMA | dict(query_pre_attn_scalar=24, sliding_window=7, hidden_activation="gelu_pytorch_tanh")

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-tied-biased": (
        "llama",
        LLAMA | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    ),
    "llama3-rope": ("llama", LLAMA | dict(rope_scaling=LLAMA3_ROPE)),
    "mistral-window": ("mistral", LLAMA | dict(sliding_window=7)),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-mixed-window": (
        "qwen2",
        LLAMA | dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    ),
    "qwen3": ("qwen3", LLAMA),
    "phi": ("phi", PHI),
    "phi-wide-rotary": ("phi", PHI | dict(num_attention_heads=2, num_key_value_heads=2)),
    "opt": ("opt", OPT),
}
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("granite", GRANITE),
    "granite-tied": ("granite", GRANITE | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "smollm3": ("smollm3", LLAMA | dict(no_rope_layers=[1, 0, 1], tie_word_embeddings=True)),
    "starcoder2": ("starcoder2", STARCODER2),
    "stablelm": ("stablelm", STABLELM),
    "nemotron": ("nemotron", LLAMA | dict(partial_rotary_factor=0.5)),
    "phi3": ("phi3", LLAMA | dict(hidden_size=64, sliding_window=7, partial_rotary_factor=0.5)),
    "gpt-neox": ("gpt_neox", NEOX),
    "gpt-neox-sequential": ("gpt_neox", NEOX | dict(use_parallel_residual=False, rotary_pct=1.0)),
    "cohere": ("cohere", LLAMA | dict(hidden_size=64, logit_scale=0.3, rope_theta=50_000.0)),
    "gemma": ("gemma", LLAMA),
    "olmo2": ("olmo2", LLAMA | dict(hidden_size=64)),
    "gemma2": (
        "gemma2",
        GEMMA | dict(attn_logit_softcapping=5.0, final_logit_softcapping=4.0),
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | dict(
            rope_theta=1e6,
            rope_local_base_freq=100.0,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
}
"""One or two of each further family, for tests that are cheap."""
RARE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-linear-rope": ("llama", LLAMA | dict(rope_scaling=LINEAR_ROPE)),
    "llama-yarn": ("llama", LLAMA | dict(rope_scaling=YARN)),
    "phi-gelu": ("phi", PHI | dict(hidden_act="gelu")),
    "opt-gelu": ("opt", OPT | dict(activation_function="gelu")),
}
"""Variants that differ from one above in a single operator or table: too little for the whole test matrix."""


def make_model(
    variant: str, directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **save: Any
) -> Path:
    """Write a random model of `variant` into `directory`; biases and norms are random too, so that none is trivial."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, options = (VARIANTS | FURTHER | RARE)[variant]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).eval()
    fill(model)
    model.generation_config.pad_token_id = 0
    model.to(dtype).save_pretrained(directory, **save)
    return directory


def fill(model: torch.nn.Module) -> None:
    """Make biases and norms random too, so that none is trivial."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
