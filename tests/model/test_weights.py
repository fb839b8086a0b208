"""Lazy weight expressions against the same steps done eagerly by numpy."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dispc.model.storage import CheckpointTensor
from dispc.model.weights import ConcatWeight, LazyWeight
from dispc.support.errors import CheckpointError

Array = np.ndarray[Any, Any]
NUMPY = {
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


class Source:
    """A checkpoint tensor that counts how often it is read."""

    def __init__(self, values: Array, name: str = "some.weight") -> None:
        self.values, self.reads = torch.from_numpy(values), 0
        self.tensor = CheckpointTensor(name, values.shape, self.values.dtype, Path("shard.safetensors"), self.read)

    def read(self) -> torch.Tensor:
        self.reads += 1
        return self.values


def matrix(rows: int, columns: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@st.composite
def expressions(draw: st.DrawFn) -> tuple[Source, LazyWeight, Array]:
    """A source, some steps on it, and the value that numpy gives for them."""
    source = Source(matrix(draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(0, 99))))
    weight, dense = LazyWeight(source.tensor), source.values.numpy()
    kept = [np.arange(size) for size in dense.shape]
    for step in draw(st.lists(st.sampled_from(["select", "transpose"]), max_size=5)):
        if step == "select":
            axis = draw(st.integers(0, 1))
            chosen = draw(st.sets(st.integers(0, len(kept[axis]) - 1))) if len(kept[axis]) else set()
            indices = np.array(sorted(chosen), dtype=np.int64)
            weight, kept[axis] = weight.select(axis, indices), kept[axis][indices]
        else:
            weight, dense, kept = weight.transpose(), dense.T, kept[::-1]
    shape, where = [], []
    for axis, zeros in enumerate(draw(st.lists(st.sampled_from(["none", "pad", "fill"]), min_size=2, max_size=2))):
        more = draw(st.integers(0, 3)) if zeros == "pad" else 0
        if zeros == "pad":
            weight = weight.pad(axis, len(kept[axis]) + more)
        elif zeros == "fill":
            weight = weight.fill(axis)
        shape.append(dense.shape[axis] if zeros == "fill" else len(kept[axis]) + more)
        where.append(kept[axis] if zeros == "fill" else np.arange(len(kept[axis])))
    value = np.zeros(shape, dtype=dense.dtype)
    value[np.ix_(*where)] = dense[np.ix_(*kept)]
    dtype = draw(st.sampled_from(list(NUMPY)))
    weight, value = weight.cast(dtype), value.astype(NUMPY[dtype])
    return source, weight, value


@given(expressions())
def test_an_expression_has_the_value_that_numpy_gives(case: tuple[Source, LazyWeight, Array]) -> None:
    _, weight, expected = case
    found = weight.numpy()
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    assert weight.evaluate().is_contiguous()


@given(expressions())
def test_an_expression_declares_what_it_evaluates_to_and_reads_nothing_before(
    case: tuple[Source, LazyWeight, Array],
) -> None:
    source, weight, expected = case
    assert tuple(weight.shape) == weight.sizes == expected.shape
    assert weight.nbytes == expected.nbytes
    assert weight.dtype.numpy() == expected.dtype
    assert source.reads == 0
    assert weight.tobytes() == expected.tobytes()
    assert source.reads == 1


@given(st.lists(expressions(), min_size=1, max_size=3), st.sampled_from(list(NUMPY)))
def test_weights_side_by_side_are_what_numpy_concatenates(
    cases: list[tuple[Source, LazyWeight, Array]], dtype: torch.dtype
) -> None:
    parts = [weight.cast(dtype).pad(0, 40) for _, weight, _ in cases]
    together = ConcatWeight(parts)
    expected = np.concatenate([part.numpy() for part in parts], axis=1)
    assert tuple(together.shape) == together.sizes == expected.shape
    np.testing.assert_array_equal(together.numpy(), expected)


def test_weights_of_different_rows_do_not_stand_side_by_side() -> None:
    with pytest.raises(ValueError, match="side by side"):
        ConcatWeight([LazyWeight(Source(matrix(3, 4)).tensor), LazyWeight(Source(matrix(2, 4)).tensor)])


@given(expressions())
def test_steps_leave_the_expression_and_the_source_they_started_from_alone(
    case: tuple[Source, LazyWeight, Array],
) -> None:
    source, weight, _ = case
    before = source.values.clone()
    first = weight.evaluate().clone()
    weight.transpose().evaluate()
    assert torch.equal(weight.evaluate(), first)
    assert torch.equal(source.values, before)


@given(expressions(), st.integers(0, 99))
def test_rebase_applies_the_same_steps_to_another_tensor(case: tuple[Source, LazyWeight, Array], seed: int) -> None:
    source, weight, expected = case
    other = Source(matrix(*source.tensor.shape, seed=seed), "other.weight")
    rebased = weight.rebase(other.tensor)
    assert rebased.source is other.tensor
    assert rebased.sizes == expected.shape
    assert torch.equal(rebased.rebase(source.tensor).evaluate(), weight.evaluate())


def test_rebase_refuses_a_tensor_of_another_shape() -> None:
    with pytest.raises(CheckpointError, match=r"other.weight has shape \[3, 2\], config.json asks for \[2, 3\]"):
        LazyWeight(Source(matrix(2, 3)).tensor).rebase(Source(matrix(3, 2), "other.weight").tensor)


@given(
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from([np.nan, np.inf, -np.inf]),
    st.sampled_from(list(NUMPY)),
)
def test_one_value_that_is_not_finite_is_refused_wherever_it_lies(
    row: int, column: int, bad: float, dtype: torch.dtype
) -> None:
    values = matrix(6, 6)
    values[row, column] = bad
    with pytest.raises(CheckpointError, match=r"shard\.safetensors: tensor some\.weight holds NaN"):
        LazyWeight(Source(values).tensor).cast(dtype).transpose().evaluate()


@pytest.mark.parametrize(("dtype", "fits"), [(torch.float16, False), (torch.bfloat16, True), (torch.float32, True)])
def test_a_value_too_large_for_the_dtype_is_refused_with_the_remedy(dtype: torch.dtype, fits: bool) -> None:
    values = matrix(2, 2)
    values[1, 1] = 1e6
    weight = LazyWeight(Source(values).tensor).cast(dtype)
    if fits:
        assert torch.isfinite(weight.evaluate()).all()
    else:
        with pytest.raises(CheckpointError, match="wider --dtype"):
            weight.evaluate()


@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("cannot\nmap"), "safetensors"])
def test_a_tensor_that_cannot_be_read_is_named_with_its_file(error: Any) -> None:
    from safetensors import SafetensorError

    def read() -> torch.Tensor:
        raise SafetensorError("changed") if error == "safetensors" else error

    tensor = CheckpointTensor("some.weight", (2,), torch.float32, Path("shard.safetensors"), read)
    with pytest.raises(CheckpointError, match=r"shard\.safetensors: tensor some\.weight cannot") as refusal:
        LazyWeight(tensor).evaluate()
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_even_where_it_is_pruned_away(value: float) -> None:
    values = matrix(4, 5)
    values[2, 3] = value
    weight = LazyWeight(Source(values).tensor).select(0, np.array([0, 1])).select(1, np.array([0, 4]))
    with pytest.raises(CheckpointError, match=r"some\.weight holds NaN or infinity"):
        weight.evaluate()
