"""Masks out of what the authors' published code leaves behind. Nothing of it is executed.

Two forms: the state of its hypernetwork (`hn-ckpt-final-0.50.pt`), and a pruned model directory whose modelling file
holds the selection vectors as a list literal (`self.cfgs = [[1.0, 0.0, ...], ...]`). Either has five vectors per
block: attention in, attention out, MLP in, MLP middle, MLP out.
"""

import ast
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dispc.errors import MasksError, first_line
from dispc.families import DecoderConfig
from dispc.learn.budget import set_widths
from dispc.learn.estimator import MEDIAN_OF_NOISE, OFFSET
from dispc.learn.hypernetwork import HyperNetwork
from dispc.masks import SETS, Masks

MODELLING_FILES = "modeling_*pruned*.py"
RENAMED = (
    (r"^(module\.)?bi_GRU\.", "gru."),
    (r"^(module\.)?ln_tp\.", "norm."),
    (r"^(module\.)?linear_list_tp\.", "heads."),
    (r"^(module\.)?inputs$", "inputs"),
)
"""Names of the published hypernetwork to those of `HyperNetwork`."""


def is_published_model(directory: Path) -> bool:
    """Whether a directory holds a pruned model of the published code."""
    return any(_vectors_literal(path) is not None for path in directory.glob(MODELLING_FILES))


def import_published(source: Path, config: DecoderConfig) -> Masks:
    """Masks from a hypernetwork checkpoint, or from a pruned model directory.

    Raises:
        MasksError: when `source` is neither, or does not fit the model's config.
    """
    if source.is_dir():
        return masks_of_directory(source, config)
    if not source.is_file():
        raise MasksError(f"{source}: no such file or directory")
    return masks_of_hypernetwork(source, config)


def masks_of_hypernetwork(file: Path, config: DecoderConfig) -> Masks:
    """The sets that the published hypernetwork's gates keep more often than not.

    The published code draws noise when it prunes, so one checkpoint gives it many models; here every gate takes its
    likelier value, that of the median noise.
    """
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise MasksError(f"{file}: not a checkpoint that loads without running code ({first_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise MasksError(f"{file}: not the state of a hypernetwork (a dictionary of tensors is expected)")
    renamed = {}
    for name, value in state.items():
        for pattern, ours in RENAMED:
            if re.match(pattern, name):
                name = re.sub(pattern, ours, name)
                break
        renamed[name] = value.float()
    if "inputs" not in renamed:
        raise MasksError(f"{file}: not the state of a published hypernetwork (it has no tensor 'inputs')")
    renamed["inputs"] = renamed["inputs"].flatten(0, -2)
    network = HyperNetwork(set_widths(config))
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        raise MasksError(f"{file}: does not fit this model: {_difference(network, renamed)}") from error
    with torch.no_grad():
        gates = network() + OFFSET + MEDIAN_OF_NOISE["gumbel"] > 0
    vectors = [piece.numpy() for piece in torch.split(gates, set_widths(config))]
    return _masks(vectors, config, file.name, "published hypernetwork")


def masks_of_directory(directory: Path, config: DecoderConfig) -> Masks:
    """The sets written into the modelling file of a pruned model directory, read as data."""
    for path in sorted(directory.glob(MODELLING_FILES)):
        literal = _vectors_literal(path)
        if literal is None:
            continue
        widths = set_widths(config)
        if len(literal) != len(widths):
            raise MasksError(f"{path}: holds {len(literal)} selection vectors, this model has {len(widths)}")
        for number, (vector, width) in enumerate(zip(literal, widths, strict=True)):
            if len(vector) != width or not set(vector) <= {0, 1}:
                raise MasksError(f"{path}: selection vector {number} must be {width} numbers 0 or 1")
        return _masks([np.array(vector) for vector in literal], config, directory.name, "published pruned model")
    raise MasksError(f"{directory}: no {MODELLING_FILES} with selection vectors in it (self.cfgs = [[...], ...])")


def _vectors_literal(path: Path) -> list[list[float]] | None:
    """The list of lists assigned to `cfgs` in a Python file, parsed and never run; None when there is none."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return None
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        names = {getattr(target, "attr", getattr(target, "id", None)) for target in node.targets}
        if "cfgs" not in names:
            continue
        try:
            value = ast.literal_eval(node.value)
        except (ValueError, TypeError):
            continue
        if isinstance(value, list) and value and all(_is_vector(item) for item in value):
            return value
    return None


def _is_vector(item: object) -> bool:
    return isinstance(item, list) and all(isinstance(number, int | float) for number in item)


def _masks(vectors: Sequence[Any], config: DecoderConfig, source: str, method: str) -> Masks:
    indices = [np.flatnonzero(vector) for vector in vectors]
    blocks = [dict(zip(SETS, indices[at : at + len(SETS)], strict=True)) for at in range(0, len(indices), len(SETS))]
    masks = Masks.from_indices(blocks, config)
    pruned = 1.0 - masks.kept_parameters(config) / (config.block_parameters * config.num_hidden_layers)
    metadata = {"method": method, "imported_from": source, "pruning_ratio": f"{pruned:.4f}", "ratio_of": "blocks"}
    return Masks(masks.blocks, masks.hidden_size, masks.intermediate_size, masks.norm_scope, metadata)


def _difference(network: HyperNetwork, state: dict[str, Tensor]) -> str:
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    name = next(name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name))
    return f"{name} is {found.get(name, 'missing')}, {wanted.get(name, 'nothing')} is expected"
