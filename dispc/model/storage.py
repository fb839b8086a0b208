"""The tensors of a model directory as they stand in its files: headers are read, values one tensor at a time.

Nothing is ever executed: safetensors, or `torch.load(weights_only=True)` for `.bin` files.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dispc.masks import is_mask_file
from dispc.support.dtypes import BY_SAFETENSORS, DTYPES, name_of
from dispc.support.errors import CheckpointError, first_line
from dispc.support.inputs import naming, read_object, regular
from dispc.support.torch_files import is_plain, load_torch

LFS_POINTER = b"version https://git-lfs."  # how every pointer file begins, by its specification
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|npz|gguf)", re.IGNORECASE)
"""Names that files with weights have."""
NO_PART_OF_THE_MODEL = re.compile(
    r"consolidated.*|.*\.gguf"  # the weights once more, for other programs
    r"|training_args\.bin|optimizer.*|scheduler.*|scaler.*|rng_state.*|random_states.*|hn-ckpt.*"  # of a trainer
)
TORCH_COPY = re.compile(r"pytorch_model.*\.bin")
"""The weights once more, where safetensors are read."""


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor that is still on disk. `read` loads it and keeps no reference."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[[], torch.Tensor]

    def expect(self, shape: tuple[int, ...]) -> "CheckpointTensor":
        """This tensor, which must have the shape that the model gives it.

        Raises:
            CheckpointError: when it has not.
        """
        if self.shape != shape:
            raise CheckpointError(
                f"{self.file}: {self.name} has shape {list(self.shape)}, config.json asks for {list(shape)}"
            )
        return self


@dataclass
class Stored:
    """What the weight files of a directory hold: tensors by name, and the dtypes of those that are no weights."""

    tensors: dict[str, CheckpointTensor] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    def add(self, more: "Stored", path: Path) -> None:
        """Take in what `path` holds.

        Raises:
            CheckpointError: for a tensor that is there already: which of the two is meant?
        """
        if doubles := sorted({*more.tensors, *more.others} & {*self.tensors, *self.others}):
            raise CheckpointError(
                f"{path}: holds tensor {doubles[0]}, which another shard holds too; remove one of them"
            )
        self.tensors |= more.tensors
        self.others |= more.others


def list_stored(directory: Path) -> Stored:
    """The tensors of the weight files in `directory`.

    Raises:
        CheckpointError: when a file is missing, damaged, or outside the directory, or when there are weights that
            belong to the model and are not part of it.
    """
    for name in ADAPTERS:
        if (directory / name).exists():
            raise CheckpointError(
                f"{directory / name}: an adapter that is not merged; merge it first (PEFT: merge_and_unload, then "
                "save_pretrained), or remove its files if the model is meant without it"
            )
    for index, single, list_tensors in (
        (INDICES[0], "model.safetensors", _list_safetensors),
        (INDICES[1], "pytorch_model.bin", _list_torch_file),
    ):
        if (directory / single).exists():  # before an index, as in transformers: it may be an older save's
            older = set(_weight_map(directory / index).values()) if (directory / index).exists() else set()
            _refuse_strangers(directory, {single}, older)
            return list_tensors(_downloaded(directory / single))
        if (directory / index).exists():
            return _sharded(directory / index, list_tensors)
    raise CheckpointError(f"{directory}: no model.safetensors or pytorch_model.bin (nor an index of shards)")


def _sharded(index: Path, list_tensors: Callable[[Path], Stored]) -> Stored:
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    stored = Stored()
    for shard in shards:
        path = index.parent / shard
        # A link inside the directory is fine (the cache of the hub has them), a path is not.
        if Path(shard).name != shard or not shard.strip("."):
            raise CheckpointError(f"{index}: shard {shard!r} lies outside the model directory")
        if not path.exists():
            raise CheckpointError(f"{path}: shard named by {index.name} is missing")
        stored.add(list_tensors(_downloaded(path)), path)
    if missing := sorted(set(weight_map) - set(stored.tensors) - set(stored.others)):
        raise CheckpointError(f"{index}: names tensor {missing[0]}, which no shard holds")
    _refuse_strangers(index.parent, set(shards), set())
    return stored


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: no weight_map of tensor names to file names")
    return weight_map


def _refuse_strangers(directory: Path, read: set[str], older: set[str]) -> None:
    """Raise CheckpointError for a file of weights that is not read, and not known to be something else.

    `older` are the shards of a save that was left behind.
    """
    for path in sorted(path for path in directory.iterdir() if WEIGHT_FILES.fullmatch(path.name)):
        known = path.name in read | older or NO_PART_OF_THE_MODEL.fullmatch(path.name)
        copied = TORCH_COPY.fullmatch(path.name) and all(name.endswith(".safetensors") for name in read)
        if known or copied or not path.is_file() or is_mask_file(path):
            continue
        raise CheckpointError(
            f"{path}: holds weights that are not read with the others ({', '.join(sorted(read)[:2])}); "
            "move it elsewhere if it is not part of the model"
        )


def _downloaded(path: Path) -> Path:
    with naming(path), regular(path, CheckpointError).open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights: run `git lfs pull` in its clone")
    return path


def _list_safetensors(path: Path) -> Stored:
    def read(name: str) -> torch.Tensor:
        # Opened per tensor: the mapping goes away with the tensor, so memory stays at one tensor.
        with naming(path), safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    stored = Stored()
    try:
        with naming(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                view = file.get_slice(name)
                row = BY_SAFETENSORS.get(view.get_dtype())
                if row is None:
                    stored.others[name] = str(view.get_dtype())
                else:
                    shape = tuple(view.get_shape())
                    stored.tensors[name] = CheckpointTensor(name, shape, row.torch, path, partial(read, name))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or corrupt safetensors file ({first_line(error)})") from error
    except RuntimeError as error:
        raise CheckpointError(f"{path}: cannot be mapped into memory ({first_line(error)})") from error
    return stored


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Every reader its own: what shares a mapping would see what another writes into it."""
    return tensor.detach().clone()


def _list_torch_file(path: Path) -> Stored:
    state = load_torch(path, CheckpointError, "not a torch file that can be loaded safely", mmap=True)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a state dict")
    stored = Stored()
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: holds {name!r}, a {type(value).__name__}; tensors by name are expected")
        if not is_plain(value):
            stored.others[name] = f"{name_of(value.dtype)}, {value.layout} on {value.device}"
        elif name_of(value.dtype) in DTYPES:
            stored.tensors[name] = CheckpointTensor(name, tuple(value.shape), value.dtype, path, partial(_copy, value))
        else:
            stored.others[name] = name_of(value.dtype)
    return stored
