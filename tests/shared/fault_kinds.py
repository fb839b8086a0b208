"""Kinds of faults, each planted anywhere in a compiled graph: what a compiler, a converter or an edit may get wrong.

A kind takes the graph and a place in it, and finds what it needs there by module names and operators. It raises
`NotHere` where there is nothing to spoil.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
from fault_ends import embedding, final_norm, head, logits, rotary_row
from fault_nodes import (
    activation,
    attention_scale,
    attention_window,
    interleaved,
    past_of_another,
    swap_pasts,
    swap_presents,
)
from fault_places import Place
from fault_updates import both, compare, distort
from fault_values import (
    another_index,
    bias,
    flip_column,
    indices,
    low_precision,
    norm,
    one_element,
    other_integers,
    quantised,
    roll_indices,
    scale_column,
    shift_one,
    stretch,
    swap_columns,
    swap_indices,
    swap_rows,
    weight,
    zero,
    zero_column,
    zero_row,
    zero_scale,
)


@dataclass(frozen=True)
class Kind:
    """`plant` spoils the graph. `named` is what the drill must say (None: the sub-layer), `check` what must fail.

    `quick`: a compilation finds it too.
    """

    plant: Callable[[ir.Model, Place], None]
    named: str | None = None
    check: str | None = None
    quick: bool = True


HEAD = "final norm and head"
KINDS: dict[str, Kind] = {
    "weight: a column of zeros": Kind(weight(zero_column)),
    "weight: a row of zeros": Kind(weight(zero_row)),
    "weight: a column 1 % off": Kind(weight(scale_column)),
    "weight: a column negated": Kind(weight(flip_column)),
    "weight: two rows swapped": Kind(weight(swap_rows)),
    "weight: two columns swapped": Kind(weight(swap_columns)),
    "weight: one element": Kind(weight(one_element)),
    "weight: through a narrower type": Kind(weight(low_precision)),
    "weight: all of it 1 % off": Kind(weight(stretch), check="weights", quick=False),
    "quantised: a scale of zero": Kind(quantised(2, zero_scale)),
    "quantised: scales 2 % off": Kind(quantised(2, partial(stretch, by=1.02)), check="weights", quick=False),
    "quantised: other integers": Kind(quantised(1, other_integers)),
    "bias: left out": Kind(bias(zero)),
    "bias: one element": Kind(bias(shift_one)),
    "norm: one weight": Kind(lambda model, place: norm(model, place, "weight")),
    "norm: one bias": Kind(lambda model, place: norm(model, place, "bias")),
    "norm: epsilon": Kind(lambda model, place: norm(model, place, "epsilon")),
    "read: two indices swapped": Kind(indices("read", swap_indices)),
    "read: another index": Kind(indices("read", another_index)),
    "read: rolled by one": Kind(indices("read", roll_indices)),
    "write: two indices swapped": Kind(indices("write", swap_indices)),
    "write: another index": Kind(indices("write", another_index)),
    "write: rolled by one": Kind(indices("write", roll_indices)),
    "activation: another": Kind(activation),
    "attention: scale": Kind(attention_scale),
    "attention: window": Kind(attention_window),
    "attention: rotary pairs": Kind(interleaved),
    "cache: keys and values swapped": Kind(swap_pasts),
    "cache: past of another block": Kind(past_of_another),
    "cache: present of another block": Kind(swap_presents),
    "update: 1 % off": Kind(distort(None, 1.01)),
    "update: left out": Kind(distort(None, 0.0)),
    "update: from a token on": Kind(distort(compare("GreaterOrEqual", "token", lambda p: p.token)), quick=False),
    "update: at one token": Kind(distort(compare("Equal", "token", lambda p: p.token)), quick=False),
    "update: NaN from a token on": Kind(
        distort(compare("GreaterOrEqual", "token", lambda p: p.token), float("nan")), quick=False
    ),
    "update: in one row": Kind(distort(compare("Equal", "row", lambda p: p.row))),
    "update: in batches above 4": Kind(distort(compare("Greater", "batch", lambda p: 4))),
    "update: in batches above 12": Kind(
        distort(compare("Greater", "batch", lambda p: 12)), named="", check="graph", quick=False
    ),
    "update: in several rows after many tokens": Kind(
        distort(both(compare("Greater", "batch", lambda p: 1), compare("GreaterOrEqual", "token", lambda p: p.token))),
        named="",
        check="graph",
        quick=False,
    ),
    "update: in calls of many tokens": Kind(distort(compare("Greater", "new", lambda p: p.token)), quick=False),
    "update: after any past": Kind(distort(compare("Greater", "past", lambda p: 0))),
    "update: after a long past": Kind(distort(compare("Greater", "past", lambda p: p.token - 8)), quick=False),
    "head: a column 1 % off": Kind(head, named=HEAD),
    "head: final norm": Kind(final_norm, named=HEAD),
    "head: from a token on": Kind(
        distort(compare("GreaterOrEqual", "token", lambda p: p.token), where=logits), named=HEAD, quick=False
    ),
    "head: in one row": Kind(distort(compare("Equal", "row", lambda p: p.row), where=logits), named=HEAD),
    "embedding: a token": Kind(embedding("embed_tokens"), named="", check="embeddings"),
    "embedding: a position": Kind(embedding("embed_positions"), named="", check="embeddings"),
    "rotary: one number of one table": Kind(rotary_row, named="", check="rotary tables"),
}
