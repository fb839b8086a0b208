"""Rounding by ONNX Runtime's algorithms: what the integers stand for, and what ONNX Runtime's GPTQ does not do."""

from dataclasses import replace

import numpy as np
import pytest

from dispc.passes.rounding import ALGORITHMS, Integers, pack, read_integers, round_weight, unpack
from dispc.quantisation import Quantisation, make_quantisation
from dispc.support.errors import CompileError

INT4 = Quantisation(bits=4, block_size=16, symmetric=False, head=False, embedding=False)
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((200, 8)) @ RNG.standard_normal((8, 40)) + 0.1 * RNG.standard_normal((200, 40))
WEIGHT = RNG.standard_normal((40, 6)).astype(np.float32)


def value(integers: Integers) -> np.ndarray:
    """[K,N] that a rounded weight stands for."""
    blocks = (integers.values.astype(float) - integers.zero_points[..., None]) * integers.scales[..., None]
    return np.asarray(blocks.reshape(len(blocks), -1)[:, : len(WEIGHT)].T)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_integers_stand_for_the_weight(algorithm: str) -> None:
    integers = round_weight(WEIGHT, replace(INT4, algorithm=algorithm), INPUTS.T @ INPUTS)
    assert integers.values.shape == (6, 3, 16) and integers.values.max() <= 15 and integers.zero_points.max() <= 15
    assert np.linalg.norm(value(integers) - WEIGHT) < 0.3 * np.linalg.norm(WEIGHT)


def test_onnxruntimes_gptq_still_spreads_no_error() -> None:
    """When this fails, it does what its name says: docs/quantisation.md and the option's help say that it does not."""
    with_inputs, without = (
        value(round_weight(WEIGHT, replace(INT4, algorithm="gptq"), hessian))
        for hessian in (INPUTS.T @ INPUTS, np.eye(40))
    )
    np.testing.assert_array_equal(with_inputs, without)


def test_gptq_without_inputs_is_refused() -> None:
    with pytest.raises(CompileError, match="none were recorded"):
        round_weight(WEIGHT, replace(INT4, algorithm="gptq"))


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_read_back_from_multiples_of_an_unknown_scale(symmetric: bool) -> None:
    scales = RNG.uniform(0.01, 3, (5, 4, 1))
    zero_points = np.full((5, 4, 1), 8) if symmetric else RNG.integers(0, 16, (5, 4, 1))
    blocks = ((RNG.integers(0, 16, (5, 4, 16)) - zero_points) * scales).astype(np.float32)
    found = read_integers(blocks, 4, symmetric, np.float32)
    read = (found.values.astype(np.float32) - found.zero_points[..., None]) * found.scales[..., None]
    np.testing.assert_allclose(read, blocks, rtol=1e-5, atol=1e-6)


def test_what_no_integers_stand_for_is_an_error() -> None:
    with pytest.raises(CompileError, match="no integers with one scale"):
        read_integers(RNG.standard_normal((1, 1, 16)).astype(np.float32), 4, False, np.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_undoes_packing(bits: int) -> None:
    values = RNG.integers(0, 2**bits, (3, 16)).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack(values, bits), bits), values)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("int4", {"algorithm": "awq"}, "--algorithm 'awq' is not known"),
        ("int4", {"mixed": "luck"}, "--mixed 'luck' is not known"),
        ("int8", {"algorithm": "gptq"}, "is for --quantize int4"),
        (None, {"mixed": "widths"}, "without --quantize"),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str | None, options: dict[str, str], says: str) -> None:
    with pytest.raises(CompileError, match=says):
        make_quantisation(
            name,
            "onnx-cpu",
            block_size=None,
            asymmetric=False,
            head=False,
            embedding=False,
            int8_activations=None,
            **options,
        )
