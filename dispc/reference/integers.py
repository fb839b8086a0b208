"""Weights read back from the integers of an artifact, and compared with the weights that they stand for.

GPTQ's integers depend on the text that it saw, those of the other searches on the last bits of their sums: they cannot
be computed again. So the reference multiplies by the artifact's own; what they mean is written here again, from
the definition of MatMulNBits, and integers that do not stand for the checkpoint's weights are an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from dispc.algorithms import LEAN, ROW_CHANCE, SMALL, STRAYED, TINY
from dispc.masks import Indices
from dispc.model.family import Family
from dispc.quantisation import HEAD_PRODUCT, Quantisation, product_of
from dispc.support.errors import ArtifactError

SLACK = 0.08
"""How much further than STRAYED weights may be: rounding to the nearest is what is left where a search strays."""

CHANCE = 0.5
"""All weights of a projection may be LEAN from 1 times the checkpoint's, and CHANCE over the root of their number, as
errors of rounding cancel out: GPTQ made 0.4 % of a real model. A row has LEAN once more than what dispc leaves so."""


@dataclass(frozen=True)
class PrunedWeight:
    """A weight [N,K] of the reference that is multiplied in a product, and what pruning has left of it.

    The artifact stores weight * factor.
    """

    weight: Tensor
    outputs: Indices | None
    inputs: Indices | None
    factor: float = 1.0


class StoredIntegers:
    """The quantised weights of a graph, by product."""

    def __init__(self, graph: ir.Model, family: Family) -> None:
        self.graph = graph.graph
        self.embedding = f"{family.embedding}.weight"
        self.nodes: dict[str, list[ir.Node]] = {}
        for node in self.graph:
            if node.op_type == "MatMulNBits":
                self.nodes.setdefault(self._product(node, family), []).append(node)

    def _product(self, node: ir.Node, family: Family) -> str:
        name = (node.inputs[1] and node.inputs[1].name) or ""
        block = name.startswith(f"{family.layers}.")
        return product_of(name.removesuffix(".quantised"), family) if block else HEAD_PRODUCT

    def put(self, product: str, parts: Sequence[PrunedWeight], options: Quantisation) -> None:
        """Overwrite what is left of the `parts`, which lie side by side in the product, by what the graph holds.

        Raises:
            ArtifactError: when it holds nothing, or something else.
        """
        nodes = self.nodes.get(product, [])
        if not nodes:
            raise ArtifactError(f"model.onnx: nothing is multiplied in 4 bits by the weights of {product}")
        widths = [node.attributes["K"].as_int() for node in nodes]
        rows = torch.cat(
            [self._read(node.inputs[1:], options, width) for node, width in zip(nodes, widths, strict=True)]
        )
        counts = [len(part.weight) if part.outputs is None else len(part.outputs) for part in parts]
        spare = (len(rows) - sum(counts)) // len(parts)  # aligned widths: as many rows of zeros after each
        start = 0
        for part, count in zip(parts, counts, strict=True):
            _put(product, part, rows[start : start + count], options)
            start += count + spare

    def put_embedding(self, part: PrunedWeight, options: Quantisation) -> None:
        """The same for the token embedding."""
        stored = [self.graph.initializers.get(f"{self.embedding}.{kind}") for kind in KINDS]
        _put("the embedding", part, self._read(stored, options, part.weight.shape[1]), options)

    def _read(self, stored: Sequence[ir.Value | None], options: Quantisation, width: int) -> Tensor:
        """float32 [N,K] from integers, scales and zero points."""
        arrays = [_array(value) for value in stored]
        integers, scales = arrays[0], arrays[1].float()
        outputs, blocks = scales.shape
        values = _unpack(integers.reshape(outputs, -1), options.bits).float()[:, :width]
        middle = torch.full((outputs, blocks), 2.0 ** (options.bits - 1))
        if len(arrays) > 2:
            middle = _unpack(arrays[2].reshape(outputs, -1), options.bits)[:, :blocks].float()
        middle, scales = (each.repeat_interleave(options.block_size, 1)[:, :width] for each in (middle, scales))
        return (values - middle) * scales


KINDS = ("quantised", "scales", "zero_points")


def _array(value: ir.Value | None) -> Tensor:
    """The tensor of an initializer, perhaps after a Reshape."""
    producer = value.producer() if value is not None else None
    if producer is not None:
        value = producer.inputs[0]
    if value is None or value.const_value is None:
        raise ArtifactError("model.onnx: a quantised weight is no constant")
    array = value.const_value.numpy()
    if value.const_value.dtype == ir.DataType.BFLOAT16:  # torch takes no bfloat16 from numpy
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array))


def _unpack(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def _put(name: str, part: PrunedWeight, rows: Tensor, options: Quantisation) -> None:
    outputs = torch.arange(len(part.weight)) if part.outputs is None else torch.from_numpy(part.outputs)
    inputs = torch.arange(part.weight.shape[1]) if part.inputs is None else torch.from_numpy(part.inputs)
    place = (outputs[:, None], inputs)
    kept, read = part.weight[place].float(), rows[:, : len(inputs)] / part.factor
    what, size = ("row", len(inputs)) if options.rounding.reads_text else ("block", options.block_size)
    farthest = _farthest(kept, read, size)
    if not farthest <= STRAYED + SLACK:
        raise ArtifactError(
            f"model.onnx: the integers of {name} do not stand for the checkpoint's weights: a {what} is off by "
            f"{farthest:.2f} of its norm (allowed {STRAYED + SLACK:.2f})"
        )
    shrink = not options.rounding.reads_text  # a search by least squares shrinks by the square of what it leaves
    times, beside = _times(kept.reshape(1, -1), read.reshape(1, -1))
    _require("all in all they are", name, times, LEAN + CHANCE / max(1, kept.numel()) ** 0.5, shrink * beside.square())
    times, beside = _times(kept, read)
    chance = ROW_CHANCE * beside / max(1, kept.shape[1]) ** 0.5
    _require("those of a row are", name, times, 2 * LEAN + chance, beside.square())
    part.weight[place] = read.to(part.weight.dtype)


def _require(what: str, name: str, times: Tensor, allowed: Tensor | float, shrink: Tensor) -> None:
    """Raise ArtifactError where a factor [N] is further from 1 than `allowed`; below 1, `shrink` more."""
    over = torch.where(times > 1, times - 1, 1 - times - shrink) - allowed
    worst = int(over.argmax()) if len(over) else 0
    if len(over) and not float(over[worst]) <= 0:
        raise ArtifactError(
            f"model.onnx: the integers of {name} do not stand for the checkpoint's weights: {what} "
            f"{float(times[worst]):.3f} times as large ({float(over[worst]):.3f} beyond what is allowed)"
        )


def _times(kept: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """The factors [N] by which rows `kept` [N,K] come nearest to `read`, and how far they then are, over their norms.

    Rows with next to no weights, of which rounding leaves what it likes, have 1 and 0.
    """
    norms = kept.norm(dim=1)
    counted = norms > SMALL * norms.square().mean().sqrt()
    safe = norms.clamp(min=1e-15)
    times = torch.where(counted, (read * kept).sum(dim=1) / safe.square(), 1.0)
    beside = (read - times[:, None] * kept).norm(dim=1) / safe
    return times, torch.where(counted, beside, 0.0)


def _farthest(kept: Tensor, read: Tensor, size: int) -> float:
    """The largest distance of two weights [N,K] in `size` inputs of a row, over the norm of `kept` there."""
    if not kept.numel():
        return 0.0
    apart, norms = (
        nn.functional.pad(weight, (0, -weight.shape[1] % size)).reshape(len(weight), -1, size).norm(dim=2)
        for weight in (read - kept, kept)
    )
    norms = norms.clamp(min=float(norms.max()) * TINY + 1e-30)
    return float((apart / torch.maximum(norms, SMALL * norms.square().mean(dim=1, keepdim=True).sqrt())).max())
