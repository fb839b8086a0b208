"""The algorithms of rounding: what the integers stand for, and what GPTQ gains."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispc.algorithms import ALGORITHMS, STRAYED
from dispc.passes.rounding import ROUNDING, Integers, inverse_factor, pack, round_weight
from dispc.quantisation import Quantisation, make_quantisation
from dispc.support.errors import CompileError

INT4 = Quantisation(bits=4, block_size=16, symmetric=False, head=False, embedding=False)
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((200, 8)) @ RNG.standard_normal((8, 40)) + 0.1 * RNG.standard_normal((200, 40))
WEIGHT = RNG.standard_normal((40, 6)).astype(np.float32)


def unpacked(values: np.ndarray) -> np.ndarray:
    """[..., n / 2] of two integers of 4 bits each -> [..., n]."""
    return np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)


def value(integers: Integers, inputs: int) -> np.ndarray:
    """[K,N] that a rounded weight of K inputs stands for."""
    zero_points = unpacked(integers.zero_points)[:, : integers.values.shape[1], None]
    blocks = (unpacked(integers.values).astype(float) - zero_points) * integers.scales[..., None]
    return np.asarray(blocks.reshape(len(blocks), -1)[:, :inputs].T)


def test_every_algorithm_has_its_code() -> None:
    assert ROUNDING.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_integers_stand_for_the_weight(algorithm: str) -> None:
    integers = round_weight(WEIGHT, replace(INT4, algorithm=algorithm), inverse_factor(INPUTS.T @ INPUTS))
    assert (integers.values.shape, integers.zero_points.shape) == ((6, 3, 8), (6, 2))
    assert np.linalg.norm(value(integers, len(WEIGHT)) - WEIGHT) < 0.3 * np.linalg.norm(WEIGHT)


@given(seed=st.integers(0, 2**16), inputs=st.integers(17, 50), symmetric=st.booleans())
def test_gptq_loses_less_of_the_products_than_rounding_to_the_nearest(seed: int, inputs: int, symmetric: bool) -> None:
    """Its integers are those of rounding to the nearest where inputs have nothing to do with each other.

    Of a few outputs alone it may gain little, by chance: it is asked of 64 together.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, 8)) @ rng.standard_normal((8, inputs)) + 0.1 * rng.standard_normal((200, inputs))
    weight = rng.standard_normal((inputs, 64)).astype(np.float32)
    options = replace(INT4, algorithm="gptq", symmetric=symmetric)
    by_inputs, nearest = (
        value(round_weight(weight, options, inverse_factor(hessian)), inputs) for hessian in (x.T @ x, np.eye(inputs))
    )
    step = np.abs(nearest - weight).max(axis=0)
    assert np.linalg.norm(x @ (by_inputs - weight)) < 0.8 * np.linalg.norm(x @ (nearest - weight))
    assert (step <= np.abs(weight).max(axis=0) / 7).all()


def test_gptq_without_inputs_is_refused() -> None:
    with pytest.raises(CompileError, match="none were recorded"):
        round_weight(WEIGHT, replace(INT4, algorithm="gptq"))


def test_the_first_of_two_integers_of_4_bits_is_the_lower_half_of_a_byte() -> None:
    values = RNG.integers(0, 16, (3, 16)).astype(np.uint8)
    packed = pack(values, 4)
    np.testing.assert_array_equal(packed & 15, values[:, 0::2])
    np.testing.assert_array_equal(packed >> 4, values[:, 1::2])


def test_integers_of_8_bits_are_bytes() -> None:
    values = RNG.integers(0, 256, (3, 16)).astype(np.uint8)
    np.testing.assert_array_equal(pack(values, 8), values)


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


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_blocks_that_searches_lose_are_kept(algorithm: str, dtype: type[np.floating]) -> None:
    """Weights of one sign, equal ones, and some that are all but zero."""
    weight = np.random.default_rng(5).standard_normal((48, 6)).astype(dtype)
    weight[16:32, 0] = np.linspace(0.5, 0.6, 16)
    weight[16:32, 1] = 0.7
    weight[:16, 2] = 1e-6
    weight[5, 2] = 0
    rounded = round_weight(weight, replace(INT4, algorithm=algorithm), inverse_factor(np.eye(48, dtype=np.float32)))
    error = np.linalg.norm(value(rounded, 48) - weight.astype(np.float32), axis=0)
    assert (error <= STRAYED * np.linalg.norm(weight.astype(np.float32), axis=0)).all()
    assert np.abs(value(rounded, 48)[16:32, :2] - weight[16:32, :2]).max() < 0.2


def test_rows_that_errors_have_moved_far_are_rounded_to_the_nearest() -> None:
    """Inputs that are nearly the same number let one weight stand for another: what fits the text is no such row."""
    scales = np.repeat([100.0, 1.0], 16)
    x = np.random.default_rng(3).standard_normal((200, 1)) * scales
    hessian = x.T @ x + np.eye(32)
    weight = np.random.default_rng(4).standard_normal((32, 64)).astype(np.float32)
    moved, nearest = (
        value(round_weight(weight, replace(INT4, algorithm=name), inverse_factor(hessian)), 32) - weight
        for name in ("gptq", "rtn")
    )
    norms = np.linalg.norm(weight, axis=0)
    assert (np.linalg.norm(moved, axis=0) <= STRAYED * norms).all()
    assert (moved == nearest).all(axis=0).any() and not (moved == nearest).all()


def test_logging_stays_the_callers_own() -> None:
    code = """
import logging, numpy as np
from dispc.passes.rounding import ROUNDING, round_weight
from dispc.quantisation import Quantisation
for name in sorted(set(ROUNDING) - {"gptq"}):
    options = Quantisation(bits=4, block_size=16, symmetric=False, head=False, embedding=False, algorithm=name)
    round_weight(np.ones((16, 2), dtype=np.float32), options)
print(logging.getLogger().handlers, logging.getLogger().level)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 30"
