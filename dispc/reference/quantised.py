"""The reference with its weights rounded as the artifact's are: written in torch, sharing no code with the pass.

The rule is that of ONNX Runtime's quantiser, from its source (mlas/lib/q4_dq.cpp); with n bits, along the kept inputs
of one output, in blocks:

    symmetric    scale = -extreme / 2^(n-1), extreme the weight of largest magnitude; zero point 2^(n-1)
    asymmetric   scale = (max - min) / (2^n - 1) with min <= 0 <= max;                zero point round(-min / scale)
    w -> (clamp(round(w / scale + zero point), 0, 2^n - 1) - zero point) * scale
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dispc.masks import Block, Indices, Masks
from dispc.model.families import Family, logits_multiplier
from dispc.plan import Quantisation
from dispc.support.dtypes import DTYPES

PIECE = 4096
"""Outputs rounded at a time, so that the working memory stays small next to the weight."""


def match_quantisation(model: Any, family: Family, masks: Masks, manifest: Mapping[str, Any]) -> None:
    """Round the masked reference's weights as the artifact of `manifest` (its dispc.json) has them, if it has."""
    if manifest.get("quantisation"):
        options = Quantisation(**manifest["quantisation"])
        quantise_reference(model, family, masks, options, DTYPES[manifest["dtype"]].torch)


@torch.no_grad()
def quantise_reference(
    model: Any, family: Family, masks: Masks, quantisation: Quantisation, dtype: torch.dtype
) -> None:
    """Round the weights of the masked reference in place; `dtype` is the artifact's, whose weights were cast first.

    What a block of weights is depends on the pruning: the inputs that are left are numbered anew.
    """
    for number, sets in enumerate(masks.blocks):
        quantise_block(model.get_submodule(family.block(number)), family, sets, quantisation, dtype)
    quantise_tables(model, quantisation, dtype)


@torch.no_grad()
def quantise_block(
    block: nn.Module, family: Family, sets: Block, quantisation: Quantisation, dtype: torch.dtype
) -> None:
    """The same for one block and its sets."""
    for alive, names, inputs in (
        (sets.attention.alive, family.attention_reads, sets.attention.read),
        (sets.attention.alive, (family.attention_out,), None),
        (sets.mlp.alive, family.mlp_reads, sets.mlp.read),
        (sets.mlp.alive, (family.down,), sets.mlp.mid),
    ):
        for name in names if alive else ():
            layer: Any = block.get_submodule(name)
            written = name in (family.attention_out, family.down)
            factor = getattr(block, "residual_multiplier", 1.0) if written else 1.0
            round_weight(layer.weight, inputs, quantisation, dtype, factor)


@torch.no_grad()
def quantise_tables(model: Any, quantisation: Quantisation, dtype: torch.dtype) -> None:
    """The same for the token embedding and the LM head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone())  # tied weights are stored apart: one may be rounded
    if quantisation.head:
        round_weight(head.weight, None, quantisation, dtype, 1.0 if tied else logits_multiplier(model.config))
    if quantisation.embedding:
        round_weight(embedding.weight, None, quantisation, dtype)


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
