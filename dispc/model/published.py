"""A pruned model directory of the authors' published code, as a `Checkpoint`: its sets, and its weights at full width.

That code saves each projection with only the rows and columns that it keeps, and writes the selection vectors as a list
literal into its modelling file (`self.cfgs = [[1.0, 0.0, ...], ...]`), which is never run here. A block has five:
attention in, attention out, MLP in, MLP middle, MLP out.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dispc.masks import SETS, Indices, Masks, set_widths
from dispc.model.checkpoint import Checkpoint
from dispc.model.config import DecoderConfig
from dispc.model.storage import CheckpointTensor
from dispc.support.errors import CheckpointError, MasksError
from dispc.support.inputs import contents

MODELLING_FILES = "modeling_*pruned*.py"
ASSIGNMENT = re.compile(r"^[ \t]*(?:\w+\.)?cfgs[ \t]*=[ \t]*\[\s*((?:\[[^\[\]]*\]\s*(?:,\s*)?)+)\]", re.MULTILINE)
VECTOR = re.compile(r"\[([^\[\]]*)\]")
Vectors = tuple[npt.NDArray[np.float64], ...]
LARGEST = 2**26
"""Of a modelling file, in bytes; the selection vectors of a 7B model take 7 million."""
Kept = tuple[Indices | None, int]
"""What is kept of an axis (None: all of it), and its full width."""


def open_checkpoint(directory: Path) -> Checkpoint:
    """The model directory as the kind of checkpoint that it is.

    Raises:
        CheckpointError, UnsupportedModelError: as `Checkpoint` does.
    """
    published = next(_literals(directory), None) is not None
    return PublishedCheckpoint(directory) if published else Checkpoint(directory)


class PublishedCheckpoint(Checkpoint):
    """A pruned model that the authors' published code saved; everything else sees it dense, with masks of its own."""

    @cached_property
    def own_masks(self) -> Masks:
        """The sets written into its modelling file.

        Raises:
            MasksError: when they do not fit the model's config.
        """
        return masks_of_directory(self.directory, self.config)

    @cached_property
    def tensors(self) -> Mapping[str, CheckpointTensor]:
        """As in `Checkpoint`, narrow projections at full width, with zeros in what was pruned."""
        return widen(self.stored, self.own_masks, self.config)


def masks_of_directory(directory: Path, config: DecoderConfig) -> Masks:
    """The sets written into the modelling file of a pruned model directory, read as data.

    Raises:
        MasksError: when there are none, or they do not fit the model's config.
    """
    for path, literal in _literals(directory):
        widths = set_widths(config)
        if len(literal) != len(widths):
            raise MasksError(f"{path}: holds {len(literal)} selection vectors, this model has {len(widths)}")
        for number, (vector, width) in enumerate(zip(literal, widths, strict=True)):
            if len(vector) != width or not np.isin(vector, (0, 1)).all():
                raise MasksError(f"{path}: selection vector {number} must be {width} numbers 0 or 1")
        return masks_of_vectors(literal, config, directory, "published pruned model")
    raise MasksError(f"{directory}: no {MODELLING_FILES} with selection vectors in it (self.cfgs = [[...], ...])")


def masks_of_vectors(vectors: Sequence[Any], config: DecoderConfig, source: Path, method: str) -> Masks:
    """Masks from 0/1 (or boolean) vectors of full width, block after block in the order of `SETS`."""
    indices = [np.flatnonzero(vector) for vector in vectors]
    blocks = [dict(zip(SETS, indices[at : at + len(SETS)], strict=True)) for at in range(0, len(indices), len(SETS))]
    masks = Masks.from_indices(blocks, config)
    pruned = 1.0 - masks.kept_parameters(config) / config.all_block_parameters
    metadata = {"method": method, "imported_from": source.name, "pruning_ratio": f"{pruned:.4f}", "ratio_of": "blocks"}
    return replace(masks, metadata=metadata)


def widen(tensors: Mapping[str, CheckpointTensor], masks: Masks, config: DecoderConfig) -> dict[str, CheckpointTensor]:
    """All tensors, those of pruned projections at full width: zero where nothing was kept. Values are read on demand.

    Raises:
        CheckpointError: when a tensor is neither as narrow as its sets nor of full width.
    """
    wide = dict(tensors)
    for name, axes in _selections(masks, config):
        stored = name if name in tensors else name.removeprefix("model.")
        if stored in tensors:
            wide[stored] = _widened(tensors[stored], axes)
    return wide


def _selections(masks: Masks, config: DecoderConfig) -> Iterator[tuple[str, tuple[Kept, Kept]]]:
    """Every parameter that the sets narrow, and what they keep of its rows and columns."""
    family, hidden, middle = config.family, config.hidden_size, config.intermediate_size
    for index, block in enumerate(masks.blocks):
        sets = block.sets()
        read, write, mlp_read, mlp_write = (
            (sets[name], hidden) for name in ("attention.read", "attention.write", "mlp.read", "mlp.write")
        )
        mid: Kept = (sets["mlp.mid"], middle)
        whole: Kept = (None, 0)
        for names, rows, columns in (
            (family.attention_reads, whole, read),
            ((family.attention_out,), write, whole),
            (family.mlp_reads, mid, mlp_read),
            ((family.down,), mlp_write, mid),
        ):
            for name in names:
                for kind in ("weight", "bias"):  # a bias has rows only
                    yield f"{family.block(index)}.{name}.{kind}", (rows, columns)


def _widened(tensor: CheckpointTensor, axes: tuple[Kept, Kept]) -> CheckpointTensor:
    shape, narrow = list(tensor.shape), list[Indices | None]()
    for axis, (kept, width) in zip(range(len(shape)), axes, strict=False):
        full = kept is None or shape[axis] == width
        narrow.append(None if full else kept)
        if kept is not None and not full:
            if shape[axis] != len(kept):
                raise CheckpointError(
                    f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}; along axis {axis} the selection "
                    f"vectors keep {len(kept)} of {width}"
                )
            shape[axis] = width
    if all(kept is None for kept in narrow):
        return tensor
    return replace(tensor, shape=tuple(shape), read=partial(_scatter, tensor.read, narrow, tuple(shape)))


def _scatter(
    read: Callable[[], torch.Tensor], narrow: Sequence[Indices | None], shape: tuple[int, ...]
) -> torch.Tensor:
    value = read()
    wide = torch.zeros(shape, dtype=value.dtype)
    axes = [np.arange(size) if kept is None else kept for kept, size in zip(narrow, shape, strict=True)]
    wide[tuple(torch.from_numpy(axis) for axis in np.ix_(*axes))] = value
    return wide


def _literals(directory: Path) -> Iterator[tuple[Path, Vectors]]:
    """Modelling files of a directory with the selection vectors in them."""
    for path in sorted(directory.glob(MODELLING_FILES)):
        state = path.stat()
        vectors = _vectors_literal(path, state.st_mtime_ns, state.st_size)
        if vectors is not None:
            yield path, vectors


@lru_cache(maxsize=1)
def _vectors_literal(path: Path, changed: int, size: int) -> Vectors | None:
    """The list of lists of numbers assigned to `cfgs` in a Python file, read as data; None when there is none.

    The numbers are read as such: a syntax tree of those of a 7B model takes seconds and 1.2 GB. A command asks for them
    several times, hence the cache; `changed` (when) and `size` are part of its key.
    """
    try:
        text = contents(path, CheckpointError, LARGEST).decode()
    except UnicodeDecodeError:
        return None
    for assignment in ASSIGNMENT.finditer(text):
        try:
            return tuple(_numbers(vector) for vector in VECTOR.findall(assignment[1]))
        except ValueError:
            continue
    return None


def _numbers(text: str) -> npt.NDArray[np.float64]:
    parts = text.strip(" \t\r\n,").split(",")
    return np.array([float(part) for part in parts if len(parts) > 1 or part])
