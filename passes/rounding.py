"""The algorithms that round weights, a function for each row of `dispc.algorithms`: ONNX Runtime's own, but for GPTQ.

Every algorithm takes a weight [K,N] and gives `Integers`: what MatMulNBits multiplies by is
(integers - zero points) * scales, block by block along K.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dispc.algorithms import LEAN, NEAREST, ROW_CHANCE, SMALL, STRAYED, TINY
from dispc.quantisation import Quantisation
from dispc.support.arrays import Array
from dispc.support.errors import CompileError

DAMPING = 0.01
"""Share of the mean of a Hessian's diagonal that GPTQ adds to it."""


@dataclass(frozen=True)
class Integers:
    """A rounded weight of N outputs, in k blocks of b inputs, the last one filled up with zeros; packed (see `pack`).

    Args:
        values: uint8 [N, k, b * bits / 8].
        scales: [N, k], of the weight's dtype.
        zero_points: uint8 [N, ceil(k * bits / 8)]; they say nothing where the weight is symmetric.
    """

    values: Array
    scales: Array
    zero_points: Array


def round_weight(weight: Array, quantisation: Quantisation, factor: Array | None = None) -> Integers:
    """Round [K,N], float32 or float16 and contiguous, by the algorithm of `quantisation`.

    `factor` [K,K] is the `inverse_factor` of the sum of x x^T over the inputs x that the weight is multiplied with.
    """
    rounded = ROUNDING[quantisation.algorithm](weight, quantisation, factor)
    return rounded if quantisation.rounding.repeatable else _near(rounded, weight, quantisation)


def _near(rounded: Integers, weight: Array, quantisation: Quantisation) -> Integers:
    """The same with rows rounded to the nearest that are further from `weight` [K,N] than STRAYED, or no numbers.

    GPTQ moves some rows so far that they fit its text and stand for no weight; searches lose blocks whose weights have
    one sign, or are all but zero. Where a search did it, one block is enough.
    """
    size = len(weight) if quantisation.rounding.reads_text else quantisation.block_size
    read = _read(rounded, quantisation, len(weight))
    apart, norms = (np.linalg.norm(_blocks(each, size), axis=2) for each in (read.T - weight, weight))
    norms = np.maximum(norms, SMALL * np.sqrt(np.square(norms).mean(axis=1, keepdims=True)))
    strayed = ~(apart <= STRAYED * np.maximum(norms, TINY * norms.max())).all(axis=1) | _leans(read.T, weight)
    if strayed.any():
        nearest = _nearest(np.ascontiguousarray(weight[:, strayed]), quantisation, None)
        rounded.values[strayed], rounded.scales[strayed] = nearest.values, nearest.scales
        rounded.zero_points[strayed] = nearest.zero_points
    return rounded


def _leans(read: Array, weight: Array) -> Array:
    """Which rows (columns of [K,N]) are further from 1 times their weights than LEAN and ROW_CHANCE say; bool [N]."""
    weight = weight.astype(np.float32, copy=False)
    norms = np.linalg.norm(weight, axis=0)
    counted = norms > SMALL * np.sqrt(np.square(norms).mean())
    safe = norms.clip(min=1e-15)
    times = (read * weight).sum(axis=0) / np.square(safe)
    beside = np.linalg.norm(read - times * weight, axis=0) / safe
    over = np.where(times > 1, times - 1, 1 - times - np.square(beside)) - ROW_CHANCE * beside / len(weight) ** 0.5
    leans: Array = counted & ~(over <= LEAN)
    return leans


def _read(rounded: Integers, quantisation: Quantisation, inputs: int) -> Array:
    """float32 [N,K] that the integers stand for."""
    blocks = rounded.scales.shape[1]
    values, zero_points = (unpack(part, quantisation.bits) for part in (rounded.values, rounded.zero_points))
    scales = rounded.scales.astype(np.float32)[..., None]
    read: Array = (values.astype(np.float32) - zero_points[:, :blocks, None]) * scales
    return read.reshape(len(read), -1)[:, :inputs]


def _nearest(weight: Array, quantisation: Quantisation, _: Array | None) -> Integers:
    """ONNX Runtime's own quantiser, whose rule is in `dispc.reference.quantised`."""
    from onnxruntime.capi import _pybind_state

    bits, size = quantisation.bits, quantisation.block_size
    inputs, outputs = weight.shape
    blocks = -(-inputs // size)
    values = np.zeros((outputs, blocks, size * bits // 8), dtype=np.uint8)
    scales = np.zeros((outputs, blocks), dtype=weight.dtype)
    zero_points = np.zeros((outputs, -(-blocks * bits // 8)), dtype=np.uint8)
    kernel = {4: _pybind_state.quantize_matmul_4bits, 8: _pybind_state.quantize_matmul_8bits}[bits]
    kernel(values, weight, scales, zero_points, size, outputs, inputs, quantisation.symmetric)
    return Integers(values, scales, zero_points)


def _k_quant(weight: Array, quantisation: Quantisation, _: Array | None) -> Integers:
    """llama.cpp's search for scale and minimum that lose least, larger weights counting more; asymmetric."""
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    blocks = _blocks(weight, quantisation.block_size)
    with np.errstate(divide="ignore", invalid="ignore"):  # blocks of equal weights, which it loses
        rounded = quant_tensor_k_quant_cpu(blocks, quantisation.bits, quantisation.block_size)
    return _integers(blocks, weight.dtype, quantisation.bits, *rounded)


def _hqq(weight: Array, quantisation: Quantisation, _: Array | None) -> Integers:
    """Half-quadratic quantisation; its zero points are rounded, as fast kernels take no others."""
    with _own_logging():
        from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, HQQWeightOnlyQuantizer

    size, bits = quantisation.block_size, quantisation.bits
    blocks = _blocks(weight, size)
    quantiser = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=size, bits=bits))
    _, scale, zero = quantiser.quantize_internal(
        torch.from_numpy(blocks.reshape(len(blocks), -1)), bits=bits, group_size=size
    )
    scales, zero_points = scale.numpy()[..., None], np.clip(np.round(zero.numpy()), 0, 2**bits - 1)[..., None]
    values = np.clip(np.round(blocks / scales + zero_points), 0, 2**bits - 1)
    return _integers(blocks, weight.dtype, bits, values, scales, zero_points)


@contextmanager
def _own_logging() -> Iterator[None]:
    """Keep an import from setting up logging for the whole process, as ONNX Runtime's quantiser does."""
    root = logging.getLogger()
    handlers, level = [*root.handlers], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def inverse_factor(hessian: Array) -> Array:
    """Upper triangle U [K,K], float32, with U^T U the inverse of the damped Hessian: GPTQ's Cholesky form.

    Row i says how an error in input i is made good by the inputs after it (arXiv 2210.17323, section 3.3).
    """
    damped = hessian.astype(np.float64)
    diagonal = damped.diagonal().copy()
    damped[np.diag_indices_from(damped)] += DAMPING * diagonal.mean() + (diagonal == 0)  # inputs that are always zero
    factor: Array = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    return factor


def _gptq(weight: Array, quantisation: Quantisation, factor: Array | None) -> Integers:
    """GPTQ (arXiv 2210.17323, algorithm 1): input after input, the error of each spread over those after it.

    Ours, because ONNX Runtime's `gptq` (1.31) multiplies by the empty triangle of the factor and spreads nothing.
    """
    if factor is None:
        raise CompileError("--algorithm gptq rounds by the inputs of a product, and none were recorded for one of them")
    inputs, outputs = weight.shape
    size, top = quantisation.block_size, 2**quantisation.bits - 1
    left = np.ascontiguousarray(weight.T, dtype=np.float32)
    values = np.zeros((outputs, -(-inputs // size) * size), dtype=np.uint8)
    grids = []
    for start in range(0, inputs, size):
        stop = min(start + size, inputs)
        scale, zero_point = _grid(left[:, start:stop], quantisation, weight.dtype)
        errors = np.empty((outputs, stop - start), dtype=np.float32)
        for index in range(start, stop):
            column = left[:, index]
            rounded = np.clip(np.round(column / scale) + zero_point, 0, top)
            values[:, index] = rounded
            error = (column - (rounded - zero_point) * scale) / factor[index, index]
            left[:, index:stop] -= error[:, None] * factor[index, index:stop]
            errors[:, index - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
        grids.append((scale, zero_point))
    scales, zero_points = (np.stack(parts, axis=-1) for parts in zip(*grids, strict=True))
    blocks = values.reshape(outputs, -1, size)
    return _integers(blocks, weight.dtype, quantisation.bits, values, scales, zero_points)


def _grid(block: Array, quantisation: Quantisation, dtype: Any) -> tuple[Array, Array]:
    """Scale, as it is stored, and zero point of each row of [N,b], by the rule of dispc.reference.quantised."""
    high, low = block.max(-1), block.min(-1)
    middle, top = 2 ** (quantisation.bits - 1), 2**quantisation.bits - 1
    if quantisation.symmetric:
        scale = np.where(np.abs(high) > np.abs(low), high, low) / -middle
    else:
        high, low = high.clip(0), low.clip(None, 0)
        scale = (high - low) / top
    scale = scale.astype(dtype).astype(np.float32)
    scale = np.where(scale == 0, 1, scale)
    return scale, np.full_like(scale, middle) if quantisation.symmetric else np.round(-low / scale)


ROUNDING: Mapping[str, Callable[[Array, Quantisation, Array | None], Integers]] = {
    NEAREST: _nearest,
    "k_quant": _k_quant,
    "hqq": _hqq,
    "gptq": _gptq,
}


def _blocks(weight: Array, size: int) -> Array:
    """[K,N] as float32 [N, k, size]."""
    inputs, outputs = weight.shape
    padded = np.zeros((outputs, -(-inputs // size) * size), dtype=np.float32)
    padded[:, :inputs] = weight.T
    return padded.reshape(outputs, -1, size)


def _integers(blocks: Array, dtype: Any, bits: int, values: Array, scales: Array, zero_points: Array) -> Integers:
    shape = blocks.shape[:2]
    return Integers(
        pack(values.reshape(blocks.shape).astype(np.uint8), bits),
        scales.reshape(shape).astype(dtype),
        pack(zero_points.reshape(shape).astype(np.uint8), bits),
    )


def unpack(packed: Array, bits: int) -> Array:
    """uint8 [..., n * bits / 8] -> uint8 [..., n]: the reverse of `pack`."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def pack(values: Array, bits: int) -> Array:
    """uint8 [..., n] of integers below 2^bits -> uint8 [..., n * bits / 8]; of two in a byte the first is low."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    packed: Array = values[..., ::2] | (values[..., 1::2] << 4)
    return packed
