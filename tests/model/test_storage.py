"""Tensors of torch files are read where their values lie there one beside the other, and named where they do not."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dispc.model.storage import list_stored
from dispc.support.dtypes import DTYPES, name_of
from dispc.support.torch_files import is_plain

warnings.filterwarnings("ignore", message=".*(nested|[Ss]parse|quantiz).*")
SIZES = st.lists(st.integers(0, 4), max_size=3)
NUMBERS = st.sampled_from([row.torch for row in DTYPES.values()] + [torch.int8, torch.bool, torch.complex64])
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda tensor: tensor,
    "turned": lambda tensor: tensor.movedim(0, -1) if tensor.ndim else tensor,
    "every other": lambda tensor: tensor[::2] if tensor.ndim else tensor,
    "repeated": lambda tensor: tensor.expand(3, *tensor.shape),
    "parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
}
OTHERWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "coordinates": torch.Tensor.to_sparse,
    "compressed rows": torch.Tensor.to_sparse_csr,
    "compressed columns": torch.Tensor.to_sparse_csc,
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor[:1]]),
    "jagged": lambda tensor: torch.nested.nested_tensor([tensor, tensor[:1]], layout=torch.jagged),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "without values": lambda tensor: tensor.to("meta"),
}


@given(sizes=SIZES, dtype=NUMBERS, view=st.sampled_from(sorted(VIEWS)))
def test_any_view_of_numbers_is_plain(sizes: list[int], dtype: torch.dtype, view: str) -> None:
    assert is_plain(VIEWS[view](torch.ones(sizes, dtype=dtype)))


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), kind=st.sampled_from(sorted(OTHERWISE)))
def test_no_other_layout_is_plain(rows: int, columns: int, kind: str) -> None:
    assert not is_plain(OTHERWISE[kind](torch.ones(rows, columns)))


@pytest.mark.parametrize("kind", OTHERWISE)
def test_what_is_not_plain_is_listed_as_no_weight(kind: str, tmp_path: Path) -> None:
    odd, plain = OTHERWISE[kind](torch.ones(2, 3)), VIEWS["turned"](torch.arange(6.0).view(2, 3))
    torch.save({"odd": odd, "plain": plain}, tmp_path / "pytorch_model.bin")
    stored = list_stored(tmp_path)
    assert list(stored.tensors) == ["plain"] and list(stored.others) == ["odd"]
    assert stored.others["odd"].startswith(name_of(odd.dtype))
    assert torch.equal(stored.tensors["plain"].read(), plain)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_who_reads_a_tensor_may_write_into_it(name: str, tmp_path: Path) -> None:
    """A file is mapped into memory, and what one reader writes must not be what the next one reads."""
    weight = torch.arange(6.0).reshape(2, 3)
    if name.endswith(".bin"):
        torch.save({"weight": weight}, tmp_path / name)
    else:
        save_file({"weight": weight}, tmp_path / name)
    stored = list_stored(tmp_path).tensors["weight"]
    stored.read().zero_()
    assert torch.equal(stored.read(), weight)
