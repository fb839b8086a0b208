"""The form of a row of `FAMILIES`: where a decoder family keeps its parts, and which configs are refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dispc.model.norms import RMS, Norm

HEAD = "lm_head.weight"
"""The LM head in every graph, and in most checkpoints; a tied one is cut from the embedding under this name."""
Refusal = tuple[Callable[[Mapping[str, Any]], bool], str]
"""A test of the raw config.json, and the reason given when it holds."""


@dataclass(frozen=True)
class SubLayerNames:
    """Modules of one sub-layer, by their names in its block.

    `before` is the norm whose output the `reads` see (None: they see the residual stream), `write` the projection whose
    rows are written, `after` the norm between it and the residual add (None: there is none).
    """

    before: str | None
    reads: tuple[str, ...]
    write: str
    after: str | None


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

    The norms before the sub-layers are `attention_norm` and `mlp_norm`, those after them `attention_post_norm`
    and `mlp_post_norm`; None says that there is none. With `scaled_embedding` the embeddings are multiplied by the root
    of their width. What `packed` holds goes by the names of its parts everywhere else (`dispc.model.packed`).

    `rotary` says that queries and keys are rotated by their positions: by the frequencies of base `rope_theta` over the
    first `rotary_share` of each head, where config.json does not say it (`has_rotary_share`); `rotates_parts` says that
    it may though the default is a whole head; `local_rope_theta` is the base of sliding blocks in families that have
    two. `attention` names the implementation of transformers that the reference uses.
    `head_norms` says that queries and keys pass norms of their own before attention.
    `optimum_reads_heads` says whether optimum reads the number of key/value heads off config.json.
    `ignored` are keys of config.json that change nothing in this family. `settle` gives the raw config.json back with
    values that older files spell in another way as every release of transformers reads them.
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
    rotates_parts: bool = False
    local_rope_theta: float | None = None
    attention: str = "sdpa"
    head_norms: bool = False
    optimum_reads_heads: bool = True
    ignored: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    settle: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict

    @property
    def has_rotary_share(self) -> bool:
        """Whether config.json may say which share of each head rotates."""
        return self.rotates_parts or self.rotary_share != 1.0

    def block(self, index: int) -> str:
        """Module name of block `index`, such as `model.layers.3`."""
        return f"{self.layers}.{index}"

    def graph_module(self, index: int, side: str) -> str:
        """What the `attention` or `mlp` of block `index` is named by in graphs, whatever its modules are called."""
        return f"{self.block(index)}.{'self_attn' if side == 'attention' else side}"

    @property
    def sub_layers(self) -> dict[str, SubLayerNames]:
        """The modules of `attention` and `mlp`, in this order."""
        return {
            "attention": SubLayerNames(
                self.attention_norm, self.attention_reads, self.attention_out, self.attention_post_norm
            ),
            "mlp": SubLayerNames(self.mlp_norm, self.mlp_reads, self.down, self.mlp_post_norm),
        }

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
