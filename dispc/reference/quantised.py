"""The reference with its weights rounded as the artifact's are: written in torch, sharing no code with the pass.

The rule is that of ONNX Runtime's quantiser, from its source (mlas/lib/q4_dq.cpp); with n bits, along the kept inputs
of one output, in blocks:

    symmetric    scale = -extreme / 2^(n-1), extreme the weight of largest magnitude; zero point 2^(n-1)
    asymmetric   scale = (max - min) / (2^n - 1) with min <= 0 <= max;                zero point round(-min / scale)
    w -> (clamp(round(w / scale + zero point), 0, 2^n - 1) - zero point) * scale
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from dispc.manifest import Manifest
from dispc.masks import Block, Indices, Masks
from dispc.model.config import logits_multiplier
from dispc.model.family import Family
from dispc.quantisation import HEAD_PRODUCT, Quantisation
from dispc.reference.integers import PrunedWeight, StoredIntegers
from dispc.support.dtypes import DTYPES

PIECE = 4096
"""Outputs rounded at a time, so that the working memory stays small next to the weight."""


def match_quantisation(
    model: Any,
    family: Family,
    masks: Masks,
    manifest: Manifest,
    graph: Callable[[], ir.Model],
) -> None:
    """Round the masked reference's weights as the artifact of `manifest` has them, if it has.

    `graph` loads the artifact's own, for the algorithms whose integers are read there.

    Raises:
        ArtifactError: when integers do not stand for the weights that they were made of.
    """
    if options := manifest.quantisation:
        integers = read_integers(options, graph, family)
        quantise_reference(model, family, masks, options, DTYPES[manifest.dtype].torch, integers)


def read_integers(quantisation: Quantisation, graph: Callable[[], ir.Model], family: Family) -> StoredIntegers | None:
    """The integers of a graph where an algorithm made them that cannot be repeated; None where one can."""
    return None if quantisation.rounding.repeatable else StoredIntegers(graph(), family)


@torch.no_grad()
def quantise_reference(
    model: Any,
    family: Family,
    masks: Masks,
    quantisation: Quantisation,
    dtype: torch.dtype,
    integers: StoredIntegers | None = None,
) -> None:
    """Round the weights of the masked reference in place; `dtype` is the artifact's, whose weights were cast first.

    What a block of weights is depends on the pruning: the inputs that are left are numbered anew. With `integers`, what
    the artifact holds is taken instead of rounding again.
    """
    for number, sets in enumerate(masks.blocks):
        block = model.get_submodule(family.block(number))
        quantise_block(block, number, family, sets, quantisation, dtype, integers)
    quantise_tables(model, quantisation, dtype, integers)


@torch.no_grad()
def quantise_block(
    block: nn.Module,
    number: int,
    family: Family,
    sets: Block,
    quantisation: Quantisation,
    dtype: torch.dtype,
    integers: StoredIntegers | None = None,
) -> None:
    """The same for block `number` and its sets."""
    for product, parts in products_of_block(block, number, family, sets).items():
        round_product(product, parts, quantisation.of(product), dtype, integers)


@torch.no_grad()
def quantise_tables(
    model: Any, quantisation: Quantisation, dtype: torch.dtype, integers: StoredIntegers | None = None
) -> None:
    """The same for the token embedding and the LM head."""
    tied = untie(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if quantisation.head:
        part = PrunedWeight(head.weight, None, None, 1.0 if tied else logits_multiplier(model.config))
        round_product(HEAD_PRODUCT, [part], quantisation.of(HEAD_PRODUCT), dtype, integers)
    if quantisation.embedding:
        round_embedding(embedding.weight, quantisation, tied=tied, dtype=dtype, integers=integers)


@torch.no_grad()
def round_embedding(
    weight: Tensor, quantisation: Quantisation, *, tied: bool, dtype: torch.dtype, integers: StoredIntegers | None
) -> None:
    """Round a token embedding in place: by the inputs of a head that is `tied` to it, if rounding reads any."""
    options = quantisation if tied and quantisation.head else quantisation.without_text
    if integers is not None and not options.rounding.repeatable:
        integers.put_embedding(PrunedWeight(weight, None, None), options)
    else:
        round_weight(weight, None, options, dtype)


def untie(model: Any) -> bool:
    """Give the LM head a copy of a weight that it shares with the embedding, which may be rounded otherwise; did it?"""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone())
    return bool(tied)


def products(model: Any, family: Family, masks: Masks) -> dict[str, list[PrunedWeight]]:
    """The weights of each product that is left, by its name (`dispc.quantisation.product_of`), and of the head."""
    weights: dict[str, list[PrunedWeight]] = {}
    for number, sets in enumerate(masks.blocks):
        weights |= products_of_block(model.get_submodule(family.block(number)), number, family, sets)
    weights[HEAD_PRODUCT] = [PrunedWeight(model.get_output_embeddings().weight, None, None)]
    return weights


def products_of_block(block: Any, number: int, family: Family, sets: Block) -> dict[str, list[PrunedWeight]]:
    """The same of one block."""
    attention, mlp, factor = sets.attention, sets.mlp, getattr(block, "residual_multiplier", 1.0)
    rows = (
        ("attention.read", family.attention_reads, None, attention.read, 1.0),
        ("attention.write", (family.attention_out,), attention.write, None, factor),
        ("mlp.read", family.mlp_reads, mlp.mid, mlp.read, 1.0),
        ("mlp.write", (family.down,), mlp.write, mlp.mid, factor),
    )
    return {
        f"{number}.{side}": [PrunedWeight(block.get_submodule(name).weight, outputs, inputs, by) for name in names]
        for side, names, outputs, inputs, by in rows
        if sets.sub_layers[side.partition(".")[0]].alive
    }


def round_product(
    product: str,
    parts: Sequence[PrunedWeight],
    options: Quantisation,
    dtype: torch.dtype,
    integers: StoredIntegers | None,
) -> None:
    """Round the weights of one product in place."""
    if integers is not None and not options.rounding.repeatable:
        integers.put(product, parts, options)
        return
    for part in parts:
        round_weight(part.weight, part.inputs, options, dtype, part.factor)


def round_weight(
    weight: Tensor, inputs: Indices | None, quantisation: Quantisation, dtype: torch.dtype, factor: float = 1.0
) -> None:
    """Round `weight` [N,K] in place, in blocks along its `inputs` (None for all), as multiplied and cast first."""
    columns = torch.arange(weight.shape[1]) if inputs is None else torch.from_numpy(inputs)
    for start in range(0, len(weight), PIECE):
        rows = weight[start : start + PIECE]
        kept = (rows[:, columns] * factor).to(dtype)
        rows[:, columns] = round_blocks(kept, quantisation).to(weight.dtype) / factor


def round_blocks(weight: Tensor, quantisation: Quantisation) -> Tensor:
    """[N,K] -> float32 [N,K]: what is left of a weight after it was quantised and read back."""
    outputs, inputs = weight.shape
    size, middle, top = quantisation.block_size, 2 ** (quantisation.bits - 1), 2**quantisation.bits - 1
    padded = nn.functional.pad(weight.float(), (0, -inputs % size))  # zeros change no extreme
    blocks = padded.view(outputs, -1, size)
    high, low = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
    if quantisation.symmetric:
        scale = -torch.where(high.abs() > low.abs(), high, low) / middle
        zero_point = torch.full_like(scale, middle)
    else:
        high, low = high.clamp(min=0), low.clamp(max=0)
        scale = (high - low) / top
        zero_point = round_half_away(torch.where(scale == 0, 0, -low / scale).clamp(0, top))
    # float16 kernels divide by the scale as it is stored; bfloat16 has none, so its scales are rounded at the end.
    divisor = scale.half().float() if weight.dtype == torch.float16 else scale
    reciprocal = torch.where(divisor == 0, 0, 1 / divisor)
    integers = round_half_away(blocks * reciprocal + zero_point).clamp(0, top)
    stored = scale.to(weight.dtype).float()
    rounded: Tensor = (integers - zero_point) * stored
    return rounded.view(outputs, -1)[:, :inputs]


def round_half_away(values: Tensor) -> Tensor:
    """C's roundf for values >= 0 (torch.round goes to the even neighbour); what is below -0.5 stays below 0."""
    whole = values.trunc()
    return whole + (values - whole >= 0.5).to(values)
