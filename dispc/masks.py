"""Masks: every index set of a pruned model, and the file that keeps them (`masks.safetensors`).

The file holds, for block i, the uint8 0/1 tensors `blocks.{i}.attention.read`, `.attention.write`, `.mlp.read`,
`.mlp.mid` and `.mlp.write` of full width, and string metadata (docs/masks.md).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dispc.model.config import DecoderConfig
from dispc.support.errors import MasksError
from dispc.support.files import require_place, whole
from dispc.support.inputs import LARGEST, named_in_text, naming
from dispc.support.version import __version__

NormScope = Literal["full", "selected"]
Indices = npt.NDArray[np.int64]
FORMAT, VERSION = "dispc-masks", "1"
SETS = ("attention.read", "attention.write", "mlp.read", "mlp.mid", "mlp.write")


@dataclass(frozen=True, eq=False)
class SubLayer:
    """The sets of one attention or MLP sub-layer: sorted int64 indices. Attention has no mid set (None)."""

    read: Indices
    write: Indices
    mid: Indices | None = None

    @property
    def alive(self) -> bool:
        """False when a set is empty: such a sub-layer adds nothing, not even its biases."""
        return bool(len(self.read) and len(self.write) and (self.mid is None or len(self.mid)))


@dataclass(frozen=True, eq=False)
class Block:
    """The sets of one decoder block."""

    attention: SubLayer
    mlp: SubLayer

    @property
    def sub_layers(self) -> dict[str, SubLayer]:
        """`attention` and `mlp`, in this order."""
        return {"attention": self.attention, "mlp": self.mlp}

    def sets(self) -> dict[str, Indices]:
        assert self.mlp.mid is not None
        parts = (self.attention.read, self.attention.write, self.mlp.read, self.mlp.mid, self.mlp.write)
        return dict(zip(SETS, parts, strict=True))

    @staticmethod
    def from_sets(sets: Mapping[str, Indices]) -> "Block":
        return Block(
            SubLayer(sets["attention.read"], sets["attention.write"]),
            SubLayer(sets["mlp.read"], sets["mlp.write"], sets["mlp.mid"]),
        )


@dataclass(frozen=True, eq=False)
class Masks:
    """All sets of a model.

    `norm_scope` says what the norms before the read sets see: `full` normalises the whole residual stream and
    selects afterwards (the published code), `selected` selects first (the paper's Algorithm 1).
    """

    blocks: tuple[Block, ...]
    hidden_size: int
    intermediate_size: int
    norm_scope: NormScope = "full"
    metadata: Mapping[str, str] = field(default_factory=dict)

    # Constructors

    @staticmethod
    def from_indices(
        blocks: Sequence[Mapping[str, Sequence[int] | Indices]],
        config: DecoderConfig,
        *,
        norm_scope: NormScope = "full",
        metadata: Mapping[str, str] | None = None,
    ) -> "Masks":
        """Masks from index lists: one mapping per block with the five names of `SETS`; a missing name means full.

        Raises:
            MasksError: for an unknown name, an index out of range or twice, or a wrong number of blocks.
        """
        if norm_scope not in get_args(NormScope):
            raise MasksError(f"norm_scope {norm_scope!r}; expected one of {get_args(NormScope)}")
        rows = []
        for number, given in enumerate(blocks):
            if unknown := set(given) - set(SETS):
                raise MasksError(f"block {number}: unknown set {sorted(unknown)[0]!r}; sets are {', '.join(SETS)}")
            sets = {}
            for name in SETS:
                width = set_width(name, config.hidden_size, config.intermediate_size)
                indices = np.asarray(given.get(name, np.arange(width)), dtype=np.int64)
                if len(np.unique(indices)) != len(indices):
                    raise MasksError(f"block {number}, {name}: an index occurs twice")
                if len(indices) and not 0 <= indices.min() <= indices.max() < width:
                    raise MasksError(f"block {number}, {name}: an index lies outside 0..{width - 1}")
                sets[name] = np.sort(indices)
            rows.append(Block.from_sets(sets))
        masks = Masks(tuple(rows), config.hidden_size, config.intermediate_size, norm_scope, metadata or {})
        masks.check(config)
        return masks

    @staticmethod
    def dense(config: DecoderConfig) -> "Masks":
        """Every set full: compiling with these gives the dense model."""
        return Masks.from_indices([{}] * config.num_hidden_layers, config, metadata={"method": "dense"})

    @staticmethod
    def random(config: DecoderConfig, ratio: float, seed: int, *, norm_scope: NormScope = "full") -> "Masks":
        """Random sets of uneven widths that prune about `ratio` of the block parameters, for tests and benchmarks.

        The sets of the MLP, whose parameters are products of two widths, keep a share drawn around sqrt(1 - ratio),
        those of the attention around 1 - ratio; no set is empty.
        """
        rng = np.random.default_rng(seed)

        def draw(name: str) -> Indices:
            keep = (1.0 - ratio) ** (0.5 if name.startswith("mlp") else 1.0)
            spread = 0.5 * min(keep, 1.0 - keep)
            width = set_width(name, config.hidden_size, config.intermediate_size)
            count = int(np.clip(round(width * rng.uniform(keep - spread, keep + spread)), 1, width))
            return np.sort(rng.choice(width, count, replace=False)).astype(np.int64)

        return Masks.from_indices(
            [{name: draw(name) for name in SETS} for _ in range(config.num_hidden_layers)],
            config,
            norm_scope=norm_scope,
            metadata={
                "method": "random",
                "pruning_ratio": str(ratio),
                "ratio_of": "blocks",
                "seed": str(seed),
            },
        )

    def with_metadata(self, more: Mapping[str, str]) -> "Masks":
        """The same sets with further metadata."""
        return replace(self, metadata={**self.metadata, **more})

    # Figures

    @property
    def cache_layers(self) -> int:
        """Blocks whose attention is left, and with it a KV cache."""
        return sum(block.attention.alive for block in self.blocks)

    def kept_parameters(self, config: DecoderConfig) -> int:
        """Block parameters that remain (T in the paper): projection weights of the living sub-layers."""
        total = 0
        for block in self.blocks:
            if block.attention.alive:
                total += config.attention_parameters(len(block.attention.read), len(block.attention.write))
            if block.mlp.alive:
                assert block.mlp.mid is not None
                total += config.mlp_parameters(len(block.mlp.read), len(block.mlp.mid), len(block.mlp.write))
        return total

    def sha256(self) -> str:
        """Digest of the sets and the norm scope (not of the other metadata)."""
        digest = hashlib.sha256(self.norm_scope.encode())
        for block in self.blocks:
            for name, indices in block.sets().items():
                digest.update(name.encode() + len(indices).to_bytes(8, "little") + indices.tobytes())
        return digest.hexdigest()

    # Files

    def check(self, config: DecoderConfig, file: Path | None = None) -> None:
        """Raise MasksError naming the first difference between these masks (of `file`) and the model's config."""
        model_type = self.metadata.get("model_type", config.family.model_type)
        for what, ours, theirs in (
            ("model_type", model_type, config.family.model_type),
            ("num_hidden_layers", len(self.blocks), config.num_hidden_layers),
            ("hidden_size", self.hidden_size, config.hidden_size),
            ("intermediate_size", self.intermediate_size, config.intermediate_size),
        ):
            if ours != theirs:
                where = f"{file}: " if file else ""
                raise MasksError(f"{where}the masks belong to another model: {what} is {ours}, the model has {theirs}")

    def save(self, path: Path, config: DecoderConfig) -> None:
        """Write the mask file and its folder, replacing an older file only when this one is complete."""
        tensors = {}
        for i, block in enumerate(self.blocks):
            for name, indices in block.sets().items():
                tensor = np.zeros(set_width(name, self.hidden_size, self.intermediate_size), dtype=np.uint8)
                tensor[indices] = 1
                tensors[f"blocks.{i}.{name}"] = tensor
        metadata = dict(self.metadata) | {
            "format": FORMAT,
            "version": VERSION,
            "norm_scope": self.norm_scope,
            "model_type": config.family.model_type,
            "hidden_size": str(self.hidden_size),
            "intermediate_size": str(self.intermediate_size),
            "num_hidden_layers": str(len(self.blocks)),
            "dispc_version": __version__,
        }
        with whole(path) as partial:
            partial.write_bytes(_sort_header(save(tensors, metadata)))

    @staticmethod
    def load(path: Path) -> "Masks":
        """Read a mask file.

        Raises:
            MasksError: when the file is missing, no mask file of this version, or a tensor is not 0/1 of full width.
        """
        if not path.is_file():
            raise MasksError(f"{path}: no such mask file; learn masks first, or name another file (--masks FILE)")
        try:
            with naming(path), safe_open(path, framework="numpy") as file:
                metadata: dict[str, str] = file.metadata() or {}
                if metadata.get("format") != FORMAT:  # before a tensor is read: it may be a model of many gigabytes
                    raise MasksError(f"{path}: not a mask file (its metadata lacks format={FORMAT})")
                for name in file.keys():  # noqa: SIM118
                    entry = file.get_slice(name)
                    if entry.get_dtype() != "U8" or math.prod(entry.get_shape()) > LARGEST:
                        raise MasksError(f"{path}: {name} must be uint8 values 0 or 1, no more than {LARGEST:,}")
                tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise MasksError(f"{path}: not a readable safetensors file ({error})") from error
        if metadata.get("version") != VERSION:
            raise MasksError(f"{path}: mask format version {metadata.get('version')}; this dispc reads {VERSION}")
        try:
            layers, hidden, intermediate = (
                int(metadata[key]) for key in ("num_hidden_layers", "hidden_size", "intermediate_size")
            )
            norm_scope: Any = metadata["norm_scope"]
            metadata["model_type"]  # by which `check` knows the family
        except (KeyError, ValueError) as error:
            raise MasksError(f"{path}: metadata is missing or malformed: {error}") from error
        if min(layers, hidden, intermediate) < 1:
            raise MasksError(
                f"{path}: num_hidden_layers, hidden_size and intermediate_size must be positive, "
                f"not {layers}, {hidden}, {intermediate}"
            )
        if norm_scope not in get_args(NormScope):
            raise MasksError(f"{path}: norm_scope {norm_scope!r}; expected one of {get_args(NormScope)}")
        blocks = []
        for i in range(layers):
            sets = {}
            for name in SETS:
                key, width = f"blocks.{i}.{name}", set_width(name, hidden, intermediate)
                tensor = tensors.pop(key, None)
                if tensor is None:
                    raise MasksError(f"{path}: tensor {key} is missing")
                if tensor.dtype != np.uint8 or tensor.shape != (width,) or tensor.max(initial=0) > 1:
                    raise MasksError(f"{path}: {key} must be {width} uint8 values 0 or 1")
                sets[name] = np.flatnonzero(tensor).astype(np.int64)
            blocks.append(Block.from_sets(sets))
        if tensors:
            raise MasksError(f"{path}: unexpected tensor {sorted(tensors)[0]}")
        return Masks(tuple(blocks), hidden, intermediate, norm_scope, metadata)


def check_mask_output(path: Path, *, force: bool) -> None:
    """Raise MasksError unless a mask file may be written to `path`, in place of an older one only with `force`.

    What is no mask file is never replaced: it may be the text, or the weights, that the masks are made from.
    """
    named_in_text(path, MasksError)
    if path.is_dir():
        raise MasksError(f"{path}: is a directory; name a file in it with -o")
    if path.exists() and not force:
        raise MasksError(f"{path}: exists; replace it with --force")
    if path.is_file() and not is_mask_file(path):
        raise MasksError(f"{path}: exists and is no mask file; name another with -o, or remove it")
    require_place(path, MasksError)


def is_mask_file(path: Path) -> bool:
    """Whether a file is one that `Masks.save` wrote, of whatever version."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def _sort_header(content: bytes) -> bytes:
    """The same safetensors file with a sorted header: safetensors writes metadata in random order."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def set_width(name: str, hidden_size: int, intermediate_size: int) -> int:
    """Full width of the set called `name`, one of `SETS`."""
    return intermediate_size if name == "mlp.mid" else hidden_size


def set_widths(config: DecoderConfig) -> list[int]:
    """Full widths of all sets, block after block in the order of `SETS`."""
    return [set_width(name, config.hidden_size, config.intermediate_size) for name in SETS] * config.num_hidden_layers
