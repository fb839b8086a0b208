"""What the values of config.json may be: kind and range of every key that decides what a model computes.

transformers takes most of what it is given, and fails much later, or computes something else.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from dispc.model.rope import FULL, SLIDING
from dispc.support.errors import CheckpointError
from dispc.support.inputs import LARGEST, LEAST_POSITIONS

MOST_BLOCKS = 2**12
Kind = tuple[Callable[[Any], bool], str]
"""Whether a value is of the kind, and what is expected, in words."""


def whole(least: int, most: int = LARGEST) -> Kind:
    return lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most:,}"


def or_null(kind: Kind) -> Kind:
    holds, expected = kind
    return lambda value: value is None or holds(value), f"{expected}, or null,"


def list_of(entries: tuple[Any, ...]) -> Kind:
    def holds(value: Any) -> bool:
        return isinstance(value, list) and all(entry in entries for entry in value)

    return holds, f"a list of {' and '.join(map(str, entries))}"


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


POSITIVE: Kind = (lambda value: _number(value) and 0 < value <= LARGEST, "a positive number")
EPSILON: Kind = (lambda value: _number(value) and 0 <= value <= 1, "a number from 0 to 1")
FLAG: Kind = (lambda value: value is None or isinstance(value, bool), "true or false")
NAME: Kind = (lambda value: value is None or isinstance(value, str), "a name")

KINDS: tuple[tuple[str, Kind], ...] = (
    ("num_hidden_layers", whole(1, MOST_BLOCKS)),
    ("hidden_size|intermediate_size|ffn_dim|vocab_size|num_attention_heads", whole(1)),
    ("max_position_embeddings", whole(LEAST_POSITIONS)),
    ("original_max_position_embeddings|word_embed_proj_dim|no_rope_layer_interval", whole(1)),
    ("num_key_value_heads|head_dim|sliding_window", or_null(whole(1))),
    ("max_window_layers", whole(0)),
    ("rms_norm_eps|layer_norm_eps|norm_eps|norm_epsilon", EPSILON),
    (r"\w+_multiplier|logits_scaling|logit_scale|query_pre_attn_scalar", POSITIVE),
    (r"(attn|final)_logit_softcapping", or_null(POSITIVE)),
    (r"\w+_bias|use_\w+|\w*qk_layernorm|tie_word_embeddings|do_layer_norm_before", FLAG),
    ("layer_norm_elementwise_affine|_remove_final_layer_norm", FLAG),
    ("hidden_act|hidden_activation|activation_function", NAME),
    ("layer_types", or_null(list_of((FULL, SLIDING)))),
    ("no_rope_layers", or_null(list_of((0, 1)))),
)
"""Keys (a pattern of whole names), and what each is."""


def kind_of(key: str) -> Kind | None:
    """The kind of a key; None for one that no row names."""
    return next((kind for pattern, kind in KINDS if re.fullmatch(pattern, key)), None)


def sensible(key: str, value: Any) -> Any:
    """The value.

    Raises:
        CheckpointError: when it is not of the kind that the key has.
    """
    kind = kind_of(key)
    if kind is not None and not kind[0](value):
        raise CheckpointError(f"{key} is {value!r}; {kind[1]} is expected")
    return value
