"""A Hugging Face model directory as lazy tensors: names, shapes and dtypes at once, values one tensor at a time.

Nothing in the directory is ever executed: safetensors, or `torch.load(weights_only=True)` for `.bin` files.
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dispc.masks import Masks
from dispc.model.families import DecoderConfig, Family, find_family
from dispc.support.errors import CheckpointError, UnsupportedModelError, first_line

SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
LFS_POINTER = b"version https://git-lfs."  # how every pointer file begins, by its specification


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


class Checkpoint:
    """A model directory: config.json plus weights.

    Raises:
        CheckpointError: when a file is missing, corrupt, or named outside the directory.
        UnsupportedModelError: when dispc cannot compile this kind of model.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such model directory")
        self.directory = directory
        self.raw_config = _read_json(directory / "config.json")
        try:
            self.family: Family = find_family(self.raw_config)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{directory / 'config.json'}: {error}") from None

    @cached_property
    def pretrained_config(self) -> Any:
        """The transformers config object, which fills in the family's defaults."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(str(self.directory), trust_remote_code=False)
        except Exception as error:  # what transformers raises for nonsense shares no base class
            reason = first_line(error)
            raise CheckpointError(f"{self.directory / 'config.json'}: transformers cannot read it: {reason}") from error

    @cached_property
    def config(self) -> DecoderConfig:
        try:
            return DecoderConfig.from_pretrained(self.pretrained_config, self.family)
        except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{self.directory / 'config.json'}: {error}") from error

    @cached_property
    def config_sha256(self) -> str:
        return hashlib.sha256((self.directory / "config.json").read_bytes()).hexdigest()

    @cached_property
    def weights_sha256(self) -> str:
        """Of the files with the weights, one after another; they are read once for it."""
        digest = hashlib.sha256()
        for path in sorted({tensor.file for tensor in self.stored.values()}):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, empty when there is none."""
        path = self.directory / "generation_config.json"
        return _read_json(path) if path.is_file() else {}

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end a generation; empty when neither config says."""
        eos = self.generation_config.get("eos_token_id", self.raw_config.get("eos_token_id"))
        return eos if isinstance(eos, list) else [] if eos is None else [eos]

    @property
    def own_masks(self) -> Masks | None:
        """The sets that a model was pruned to before dispc met it; None for a dense model."""
        return None

    @property
    def tensors(self) -> Mapping[str, CheckpointTensor]:
        """Every tensor by name, in the shape of the dense model; headers are read, values are not."""
        return self.stored

    def load_model(self, dtype: torch.dtype) -> Any:
        """The dense torch model with all its weights, in `dtype`.

        Raises:
            CheckpointError: when transformers cannot load it.
        """
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # transformers 5 would draw one into the command's own output
        try:
            return AutoModelForCausalLM.from_pretrained(str(self.directory), dtype=dtype, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise CheckpointError(f"{self.directory}: transformers cannot load the model ({reason})") from error

    @cached_property
    def stored(self) -> dict[str, CheckpointTensor]:
        """Every tensor as it stands in the files; headers are read, values are not."""
        for index, single, list_tensors in (
            ("model.safetensors.index.json", "model.safetensors", _list_safetensors),
            ("pytorch_model.bin.index.json", "pytorch_model.bin", _list_torch_file),
        ):
            if (self.directory / single).is_file():  # before an index, as in transformers: it may be an older save's
                return list_tensors(_downloaded(self.directory / single))
            if (self.directory / index).is_file():
                return self._sharded(self.directory / index, list_tensors)
        raise CheckpointError(f"{self.directory}: no model.safetensors or pytorch_model.bin (nor an index of shards)")

    def _sharded(
        self, index: Path, list_tensors: Callable[[Path], dict[str, CheckpointTensor]]
    ) -> dict[str, CheckpointTensor]:
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{index}: no weight_map of tensor names to file names")
        tensors: dict[str, CheckpointTensor] = {}
        for shard in sorted(set(weight_map.values())):
            path = self.directory / shard
            if Path(shard).name != shard:  # a link inside the directory is fine (the hub's cache), a path is not
                raise CheckpointError(f"{index}: shard {shard!r} lies outside the model directory")
            if not path.is_file():
                raise CheckpointError(f"{path}: shard named by {index.name} is missing")
            tensors |= list_tensors(_downloaded(path))
        if missing := sorted(set(weight_map) - set(tensors)):
            raise CheckpointError(f"{index}: names tensor {missing[0]}, which no shard holds")
        return tensors

    def find(self, name: str) -> CheckpointTensor:
        """The tensor of parameter `name`, looking through tied embeddings and the bare base model's names.

        Raises:
            CheckpointError: when the checkpoint has no such tensor.
        """
        stored = f"{self.family.embedding}.weight" if self.config.tied and name == "lm_head.weight" else name
        for candidate in (stored, stored.removeprefix("model.")):
            if candidate in self.tensors:
                return self.tensors[candidate]
        raise CheckpointError(f"{self.directory}: tensor {name} is missing from the checkpoint")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a model directory needs it") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object is expected")
    return content


def _downloaded(path: Path) -> Path:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights: run `git lfs pull` in its clone")
    return path


def _list_safetensors(path: Path) -> dict[str, CheckpointTensor]:
    def reader(name: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            # Opened per tensor: the mapping goes away with the tensor, so memory stays at one tensor.
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor

        return read

    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                view = file.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(view.get_dtype())
                if dtype is not None:
                    tensors[name] = CheckpointTensor(name, tuple(view.get_shape()), dtype, path, reader(name))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or corrupt safetensors file ({error})") from error
    except RuntimeError as error:
        raise CheckpointError(f"{path}: cannot be mapped into memory ({str(error).splitlines()[0]})") from error
    return tensors


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _list_torch_file(path: Path) -> dict[str, CheckpointTensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(f"{path}: not a torch file that can be loaded safely ({first_line(error)})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a state dict")
    return {
        name: CheckpointTensor(name, tuple(tensor.shape), tensor.dtype, path, partial(_same, tensor))
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and tensor.dtype in SAFETENSORS_DTYPES.values()
    }
