"""Masks without learning, for baselines and people in a hurry: scores in place of latents, the same final sets."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dispc.learn.budget import RatioOf, block_budget, budget_facts, check_fits, final_sets
from dispc.learn.options import check_choices
from dispc.masks import SETS, Masks, NormScope, set_widths
from dispc.model.families import DecoderConfig
from dispc.model.published import open_checkpoint
from dispc.model.text import load_tokens, source_name, windows
from dispc.reference.masked import load_reference
from dispc.runtime.providers import torch_device
from dispc.support.errors import DataError

InstantMethod = Literal["random", "magnitude", "activation"]
Scores = npt.NDArray[np.float64]
WINDOWS = 16
"""Of text, that `activation` reads."""


def instant_masks(
    model: Path,
    method: InstantMethod,
    ratio: float,
    *,
    ratio_of: RatioOf = "blocks",
    data: str | None = None,
    sequence_length: int = 2048,
    align: int = 1,
    seed: int = 0,
    norm_scope: NormScope = "full",
    device: str | None = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Masks:
    """Masks that keep the positions with the highest scores of all sets within one budget.

    A score is divided by the mean of its set, without which the sets of different kinds could not be compared:

    - `random`: uniform numbers, seeded.
    - `magnitude`: norm of the weights that read or write the position.
    - `activation`: that norm times the norm of what the position carries over `WINDOWS` windows of `data`; for a
      write set, whose positions are the output itself, the norm of the output. The model runs on `device`.

    Raises:
        DispcError: when a choice, the budget or the data is unusable.
    """
    check_choices(ratio_of=ratio_of, norm_scope=norm_scope, align=align, sequence_length=sequence_length, seed=seed)
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    budget = block_budget(checkpoint, ratio, ratio_of)
    check_fits(config, budget, align)
    metadata = {"method": method, "align": str(align), "pruning_ratio": str(ratio)}
    if method == "random":
        scores = np.random.default_rng(seed).random(sum(set_widths(config)))
        metadata["seed"] = str(seed)
    else:
        reference = load_reference(checkpoint, None)
        norms = _weight_norms(reference, config)
        if method == "activation":
            if data is None:
                raise DataError("--method activation needs a text: give --data FILE")
            place = torch_device(device)
            rows = windows(load_tokens(data, model), min(sequence_length, config.max_positions), data)[:WINDOWS]
            ids = torch.from_numpy(rows.astype(np.int64)).to(place)
            carried = _activation_norms(reference.to(place), config, ids, progress)
            norms = [
                activation if name.endswith("write") else weight * activation
                for name, weight, activation in zip(SETS * config.num_hidden_layers, norms, carried, strict=True)
            ]
            metadata |= {"data": source_name(data), "windows": str(len(rows)), "sequence_length": str(rows.shape[1])}
        with np.errstate(invalid="ignore"):  # what is no number is found by `final_sets`
            scores = np.concatenate([norm / max(norm.mean(), np.finfo(float).tiny) for norm in norms])
    masks = final_sets(scores, config, budget, align=align, norm_scope=norm_scope)
    return replace(masks, metadata=metadata | budget_facts(masks, checkpoint, ratio_of))


def _parts(model: nn.Module, config: DecoderConfig) -> list[tuple[list[Any], bool]]:
    """For every set, block after block: the linear layers it selects from, and whether it selects their inputs."""
    family, parts = config.family, []
    for index in range(config.num_hidden_layers):
        block = model.get_submodule(family.block(index))
        for names, inputs in (
            (family.attention_reads, True), ((family.attention_out,), False), (family.mlp_reads, True),
            ((family.down,), True), ((family.down,), False),
        ):  # fmt: skip
            parts.append(([block.get_submodule(name) for name in names], inputs))
    return parts


def _weight_norms(model: nn.Module, config: DecoderConfig) -> list[Scores]:
    """For every set the L2 norm of each position's weights, [width]."""
    return [
        torch.cat([layer.weight.detach().double().square().sum(0 if inputs else 1)[None] for layer in layers])
        .sum(0)
        .sqrt()
        .numpy()
        for layers, inputs in _parts(model, config)
    ]


@torch.no_grad()
def _activation_norms(
    model: Any, config: DecoderConfig, ids: Tensor, progress: Callable[[int, int], None]
) -> list[Scores]:
    """For every set the L2 norm, over all windows of ids [n,S], of what each position carries, [width]."""
    parts = _parts(model, config)
    sums = [torch.zeros(width, dtype=torch.float64, device=ids.device) for width in set_widths(config)]

    def listen(total: Tensor, inputs: bool) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            total.add_((given[0] if inputs else output).double().square().flatten(0, -2).sum(0))

        return hook

    for total, (layers, inputs) in zip(sums, parts, strict=True):
        layers[0].register_forward_hook(listen(total, inputs))  # all layers of a read set see the same input
    for number, row in enumerate(ids):
        model(input_ids=row[None], use_cache=False, logits_to_keep=1)
        progress(number + 1, len(ids))
    return [cast(Scores, total.sqrt().cpu().numpy()) for total in sums]
