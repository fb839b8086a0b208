"""Named sizes of LLaMA-like models, with the config.json and the tensors that follow from them."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a LLaMA-like model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    tied: bool = False

    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every parameter, in the order of the model."""
        hidden, kv = self.hidden, self.kv_heads * self.hidden // self.heads
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (self.intermediate, hidden),
            "mlp.up_proj": (self.intermediate, hidden),
            "mlp.down_proj": (hidden, self.intermediate),
        }
        parts: dict[str, tuple[int, ...]] = {"model.embed_tokens": (self.vocabulary, hidden)}
        parts |= {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()}
        parts["model.norm"] = (hidden,)
        if not self.tied:
            parts["lm_head"] = (self.vocabulary, hidden)
        return {f"{name}.weight": shape for name, shape in parts.items()}


SHAPES = {
    "tiny": Shape(hidden=64, intermediate=176, layers=4, heads=4, kv_heads=2, vocabulary=512, positions=256),
    "smollm2-135m": Shape(
        hidden=576,
        intermediate=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        vocabulary=49152,
        positions=8192,
        tied=True,
    ),
    "llama-2-7b": Shape(
        hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, vocabulary=32000, positions=4096
    ),
    "llama-2-13b": Shape(
        hidden=5120, intermediate=13824, layers=40, heads=40, kv_heads=40, vocabulary=32000, positions=4096
    ),
}
SHAPES["7b-4"] = replace(SHAPES["llama-2-7b"], layers=4)
"""Blocks of LLaMA-2-7B that fit into a small machine in float32."""
