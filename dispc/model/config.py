"""The sizes of one model, whatever its family calls them: what masks, passes and the reference need to know of it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dispc.model.family import Family

PER_LAYER = ("layer_types", "no_rope_layers")
"""Options of a config that have one entry for each block."""
NO_ROTARY = " without rotary"
"""Ends the kind of a block whose queries and keys are not rotated, in a family where others are."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes of a decoder model, whatever its family calls them.

    `layer_kinds` has one entry per block; blocks of the same kind differ only in weights. Embeddings are multiplied by
    `embedding_multiplier`, the outputs of sub-layers by `residual_multiplier`, those of the LM head by
    `logits_multiplier` (before a softcap, if any).
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

    @property
    def all_block_parameters(self) -> int:
        """T of all blocks, dense."""
        return self.block_parameters * self.num_hidden_layers

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
