"""The algorithms that round weights better than to the nearest integer, all of them ONNX Runtime's own code.

Every algorithm takes a weight [K,N] and gives `Integers`: what MatMulNBits multiplies by is
(integers - zero points) * scales, block by block along K.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dispc.quantisation import Quantisation
from dispc.support.errors import CompileError

Array = npt.NDArray[Any]
DAMPING = 0.01
"""Share of the mean of a Hessian's diagonal that GPTQ adds to it."""


@dataclass(frozen=True)
class Integers:
    """A rounded weight of N outputs, in k blocks of b inputs, the last one filled up with zeros.

    Args:
        values: uint8 [N, k, b], each below 2^bits.
        scales: [N, k], of the weight's dtype.
        zero_points: uint8 [N, k].
    """

    values: Array
    scales: Array
    zero_points: Array


def round_weight(weight: Array, quantisation: Quantisation, hessian: Array | None = None) -> Integers:
    """Round [K,N], float32 or float16 and contiguous, by the algorithm of `quantisation`.

    `hessian` [K,K] is the sum of x x^T over the inputs x that the weight is multiplied with, for GPTQ.
    """
    return ALGORITHMS[quantisation.algorithm](weight, quantisation, hessian)


def _k_quant(weight: Array, quantisation: Quantisation, _: Array | None) -> Integers:
    """llama.cpp's search for scale and minimum that lose least, larger weights counting more; asymmetric."""
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    blocks = _blocks(weight, quantisation.block_size)
    with np.errstate(divide="ignore", invalid="ignore"):  # blocks of equal weights, which it then leaves as they were
        found = quant_tensor_k_quant_cpu(blocks, quantisation.bits, quantisation.block_size)
    return _integers(blocks, weight.dtype, *found)


def _hqq(weight: Array, quantisation: Quantisation, _: Array | None) -> Integers:
    """Half-quadratic quantisation; its zero points are rounded, as fast kernels take no others."""
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, HQQWeightOnlyQuantizer

    size, bits = quantisation.block_size, quantisation.bits
    blocks = _blocks(weight, size)
    quantiser = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=size, bits=bits))
    _, scale, zero = quantiser.quantize_internal(
        torch.from_numpy(blocks.reshape(len(blocks), -1)), bits=bits, group_size=size
    )
    scales, zero_points = scale.numpy()[..., None], np.clip(np.round(zero.numpy()), 0, 2**bits - 1)[..., None]
    values = np.clip(np.round(blocks / scales + zero_points), 0, 2**bits - 1)
    return _integers(blocks, weight.dtype, values, scales, zero_points)


def _gptq(weight: Array, quantisation: Quantisation, hessian: Array | None) -> Integers:
    """Column after column, the error of one spread over those that follow, by what the inputs are like.

    ONNX Runtime 1.31 takes the wrong triangle of the factor that says how, and spreads nothing.
    """
    from onnxruntime.quantization.neural_compressor.weight_only import gptq

    if hessian is None:
        raise CompileError("--algorithm gptq rounds by the inputs of a product, and none were recorded for one of them")
    size, bits = quantisation.block_size, quantisation.bits
    scheme = "sym" if quantisation.symmetric else "asym"
    rounded = gptq(
        weight.astype(np.float32), hessian.astype(np.float64), bits, size, scheme, percdamp=DAMPING
    )  # of every column, dead ones included: a weight [K,N]
    return read_integers(_blocks(rounded.astype(np.float32), size), bits, quantisation.symmetric, weight.dtype)


def read_integers(blocks: Array, bits: int, symmetric: bool, dtype: Any) -> Integers:
    """The integers of [N, k, b] float32 whose values are multiples of an unknown scale in each block.

    The scale is the largest of which all values are multiples by integers in reach of a zero point.
    """
    top = 2**bits - 1
    high, low = blocks.max(-1, keepdims=True).clip(0), blocks.min(-1, keepdims=True).clip(None, 0)
    reach = high - low
    scales, found = np.ones_like(reach), reach == 0
    for steps in range(1, top + 1):
        scale = np.where(reach == 0, 1, reach / steps)
        multiples = blocks / scale
        fits = (np.abs(multiples - np.round(multiples)).max(-1, keepdims=True) < 1e-2) & ~found
        if symmetric:
            fits &= (np.round(high / scale) < (top + 1) / 2) & (np.round(-low / scale) <= (top + 1) / 2)
        scales, found = np.where(fits, scale, scales), found | fits
    if not found.all():
        raise CompileError("GPTQ rounded a block of weights to what no integers with one scale stand for")
    zero_points = np.full_like(scales, (top + 1) / 2) if symmetric else np.round(-low / scales)
    return _integers(blocks, dtype, np.round(blocks / scales) + zero_points, scales, zero_points)


ALGORITHMS: Mapping[str, Callable[[Array, Quantisation, Array | None], Integers]] = {
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


def _integers(blocks: Array, dtype: Any, values: Array, scales: Array, zero_points: Array) -> Integers:
    shape = blocks.shape[:2]
    return Integers(
        values.reshape(blocks.shape).astype(np.uint8),
        scales.reshape(shape).astype(dtype),
        zero_points.reshape(shape).astype(np.uint8),
    )


def pack(values: Array, bits: int) -> Array:
    """uint8 [..., n] of integers below 2^bits -> uint8 [..., n * bits / 8]; of two in a byte the first is low."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    packed: Array = values[..., ::2] | (values[..., 1::2] << 4)
    return packed


def unpack(packed: Array, bits: int) -> Array:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
