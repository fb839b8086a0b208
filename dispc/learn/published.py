"""Masks from what the authors' published code saves. Nothing of it is executed.

It saves the state of its hypernetwork (`hn-ckpt-final-0.50.pt`) and pruned model directories (`dispc.model.published`).
Either holds five vectors per block: attention in, attention out, MLP in, MLP middle, MLP out.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from dispc.learn.estimator import MEDIAN_OF_NOISE, OFFSET
from dispc.learn.hypernetwork import HyperNetwork
from dispc.masks import Masks, set_widths
from dispc.model.config import DecoderConfig
from dispc.model.published import masks_of_directory, masks_of_vectors
from dispc.support.errors import MasksError
from dispc.support.torch_files import is_plain, load_torch

RENAMED = (
    (r"^(module\.)?bi_GRU\.", "gru."),
    (r"^(module\.)?ln_tp\.", "norm."),
    (r"^(module\.)?linear_list_tp\.", "heads."),
    (r"^(module\.)?inputs$", "inputs"),
)
"""Names of the published hypernetwork to those of `HyperNetwork`."""
LARGEST = 2**28
"""Numbers in a tensor of a hypernetwork, at most."""


def import_published(source: Path, config: DecoderConfig) -> Masks:
    """Masks from a hypernetwork checkpoint, or from a pruned model directory.

    Raises:
        MasksError: when `source` is neither, or does not fit the model's config.
    """
    if source.is_dir():
        return masks_of_directory(source, config)
    if not source.exists():
        raise MasksError(f"{source}: no such file or directory")
    return masks_of_hypernetwork(source, config)


def masks_of_hypernetwork(file: Path, config: DecoderConfig) -> Masks:
    """The sets that the published hypernetwork's gates keep more often than not.

    The published code draws noise when it prunes, so one checkpoint gives it many models; here every gate takes its
    likelier value, that of the median noise.
    """
    state = load_torch(file, MasksError, "not a checkpoint that loads without running code")
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise MasksError(f"{file}: not the state of a hypernetwork (a dictionary of tensors is expected)")
    renamed = {}
    for name, value in state.items():
        for pattern, ours in RENAMED:
            if re.match(pattern, name):
                name = re.sub(pattern, ours, name)
                break
        if not (is_plain(value) and value.is_floating_point()):
            raise MasksError(f"{file}: {name} is of {value.dtype}, {value.layout}; plain floating-point is expected")
        if value.numel() > LARGEST:  # a file may hold one number for all of them
            raise MasksError(f"{file}: {name} has {value.numel():,} numbers; no more than {LARGEST:,} are expected")
        renamed[name] = value.float()
    if "inputs" not in renamed or renamed["inputs"].ndim < 2:
        raise MasksError(f"{file}: not the state of a published hypernetwork (it has no matrix 'inputs')")
    renamed["inputs"] = renamed["inputs"].flatten(0, -2)
    network = HyperNetwork(set_widths(config))
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        raise MasksError(f"{file}: does not fit this model: {_difference(network, renamed)}") from error
    with torch.no_grad():
        latents = network()
    if not bool(torch.isfinite(latents).all()):
        raise MasksError(f"{file}: its values are no numbers (NaN or infinite); take an earlier checkpoint")
    gates = latents + OFFSET + MEDIAN_OF_NOISE["gumbel"] > 0
    vectors = [piece.numpy() for piece in torch.split(gates, set_widths(config))]
    return masks_of_vectors(vectors, config, file, "published hypernetwork")


def _difference(network: HyperNetwork, state: dict[str, Tensor]) -> str:
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    name = next(name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name))
    return f"{name} is {found.get(name, 'missing')}, {wanted.get(name, 'nothing')} is expected"
