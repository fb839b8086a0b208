"""Operators are spelled with every argument that changes the result; what is not read is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dispc.export.operators import SPELLINGS
from dispc.export.semantic import Recorder
from dispc.support.errors import CompileError

X, IDS, TABLE = torch.ones(2, 8), torch.zeros(1, 3, dtype=torch.int64), torch.ones(4, 8)


def nodes(function: Callable[..., Tensor], *inputs: Tensor) -> list[torch.fx.Node]:
    """The FX nodes of a function that have a spelling."""

    class Module(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return function(*inputs)

    program = torch.export.export(Module(), inputs)
    found = [node for node in program.graph.nodes if str(node.target) in SPELLINGS]
    assert found
    return found


def check(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    for node in nodes(function, *inputs):
        SPELLINGS[str(node.target)].refuse_unread(node, "model.layers.0.mlp")


@pytest.mark.parametrize(
    ("function", "inputs", "says"),
    [
        (lambda x, y: torch.add(x, y, alpha=2), (X, X), "alpha=2"),
        (lambda x: x[:, ::2] + x[:, 1::2], (X,), "step=2"),
        (lambda x: functional.dropout(x, 0.5, training=True), (X,), "train=True"),
        (lambda x, y: torch.div(x, y, rounding_mode="floor"), (X, X), None),
    ],
)
def test_an_argument_that_nobody_reads_is_refused(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], says: str | None
) -> None:
    if says is None:  # another overload, which has no spelling at all
        with pytest.raises(AssertionError):
            nodes(function, *inputs)
        return
    with pytest.raises(CompileError, match=rf"model\.layers\.0\.mlp: .*{says}"):
        check(function, *inputs)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x, y: torch.add(x, y, alpha=1), (X, X)),
        (lambda x: x[:, 1:4], (X,)),
        (lambda x: functional.gelu(x, approximate="tanh"), (X,)),
        (lambda x: functional.dropout(x, 0.5, training=False), (X,)),
        (lambda ids, table: functional.embedding(ids, table, padding_idx=1), (IDS, TABLE)),
        (lambda x: x.to(torch.float16), (X,)),
    ],
)
def test_what_is_read_or_changes_nothing_passes(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    check(function, *inputs)


def test_a_spelling_names_arguments_that_torch_has() -> None:
    for name, spelling in SPELLINGS.items():
        library, operator, overload = name.split(".")
        schema = getattr(getattr(getattr(torch.ops, library), operator), overload)._schema
        assert set(spelling.reads.split()) <= {argument.name for argument in schema.arguments}, name


QUERY = torch.ones(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(attn_mask=torch.zeros(3, 3), is_causal=True), "with a mask"),
        (dict(is_causal=False), "is_causal=False"),
        (dict(is_causal=True, dropout_p=0.1), r"dropout_p=0\.1"),
    ],
    ids=str,
)
def test_attention_of_another_kind_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CompileError, match=says):
        Recorder().attend_scaled(QUERY, QUERY, QUERY, **options)


@pytest.mark.parametrize("options", [dict(sinks=QUERY), dict(is_causal=False), dict(position_bias=1.0)], ids=str)
def test_an_option_of_attention_that_nobody_reads_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CompileError, match=next(iter(options))):
        Recorder().attend(None, QUERY, QUERY, QUERY, None, **options)
