"""The facts of a mask file, an artifact or a model directory, for tables and for --json."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from dispc.manifest import MANIFEST, read_manifest, summary
from dispc.masks import SETS, Masks, set_width
from dispc.model.published import open_checkpoint
from dispc.support.dtypes import name_of
from dispc.support.errors import ArtifactError, DispcError
from dispc.support.graph import read_graph
from dispc.support.inputs import read_object
from dispc.support.typed_json import OPTIONAL


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is known of a path; its kind is `masks`, `artifact` or `model`.

    `widths` has a row for each block, by set; only artifacts have operators, by type (those of the blocks each, and of
    what is outside in a last row), and a manifest: the content of dispc.json.
    """

    kind: str
    facts: Mapping[str, object]
    widths: Sequence[Mapping[str, int]]
    full_widths: Mapping[str, int]
    operators: Mapping[str, int] | None = field(default=None, metadata=OPTIONAL)
    block_operators: Sequence[Mapping[str, int]] | None = field(default=None, metadata=OPTIONAL)
    manifest: Mapping[str, Any] | None = field(default=None, metadata=OPTIONAL)


def inspect_path(path: Path) -> Inspection:
    """The facts of what is at `path`.

    Raises:
        DispcError: when `path` is none of the three kinds.
    """
    if path.is_file():
        return _masks(path)
    if (path / MANIFEST).is_file():
        return _artifact(path)
    if (path / "config.json").is_file():
        return _model(path)
    raise DispcError(f"{path}: is no mask file, artifact or model directory")


def masks_of(path: Path) -> Masks:
    """The masks in a mask file, an artifact or a published pruned model, or those beside a model.

    Raises:
        DispcError: when `path` is none of these.
    """
    if (path / MANIFEST).is_file() or not (path / "config.json").is_file():
        return Masks.load(path / "masks.safetensors" if path.is_dir() else path)
    return open_checkpoint(path).own_masks or Masks.load(path / "masks.safetensors")


def _masks(path: Path) -> Inspection:
    masks = Masks.load(path)
    widths, full = _widths(masks)
    kept = {name: sum(row[name] for row in widths) / (len(widths) * full[name]) for name in SETS}
    facts = dict(masks.metadata) | {f"mean {name}": f"{100 * share:.1f} %" for name, share in kept.items()}
    facts |= {"bytes": f"{path.stat().st_size:,}", "sha256": masks.sha256()}
    return Inspection(kind="masks", facts=facts, widths=widths, full_widths=full)


def _widths(masks: Masks) -> tuple[list[dict[str, int]], dict[str, int]]:
    widths = [{name: len(indices) for name, indices in block.sets().items()} for block in masks.blocks]
    return widths, {name: set_width(name, masks.hidden_size, masks.intermediate_size) for name in SETS}


def _artifact(path: Path) -> Inspection:
    manifest = read_manifest(path)
    widths, full = _widths(Masks.load(path / "masks.safetensors"))
    graph = read_graph(path / "model.onnx")
    operators = Counter(f"{node.domain}.{node.op_type}".removeprefix(".") for node in graph.node)
    facts = {"model": manifest.model_type, "target": f"{manifest.target}, {manifest.dtype}"} | summary(manifest)
    facts["validation"] = {None: "not run", True: "passed", False: "failed"}[manifest.passed]
    facts["compiled by"] = f"dispc {manifest.dispc}"
    return Inspection(
        kind="artifact",
        facts=facts,
        widths=widths,
        full_widths=full,
        operators=dict(operators.most_common()),
        block_operators=_block_operators(graph, len(widths)),
        manifest=read_object(path / MANIFEST, ArtifactError),
    )


def _block_operators(graph: onnx.GraphProto, blocks: int) -> list[dict[str, int]]:
    """Operators of each block, by the names of its nodes (none where all of it is pruned); in a last row all others."""
    rows: list[Counter[str]] = [Counter() for _ in range(blocks + 1)]
    for node in graph.node:
        block = re.search(r"/layers\.([0-9]{1,6})/", node.name)
        rows[min(int(block[1]), blocks) if block else blocks][node.op_type] += 1
    return [dict(row.most_common()) for row in rows]


def _model(path: Path) -> Inspection:
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    tensors = checkpoint.stored.values()
    masks = checkpoint.own_masks
    widths, full = ([], {}) if masks is None else _widths(masks)
    dtypes = Counter(name_of(tensor.dtype) for tensor in tensors)
    facts: dict[str, object] = {
        "model": f"{config.family.model_type} ({config.family.title})",
        "blocks": config.num_hidden_layers,
        "hidden, intermediate size": f"{config.hidden_size}, {config.intermediate_size}",
        "heads": f"{config.num_attention_heads} of {config.head_dim}, {config.num_key_value_heads} key/value",
        "vocabulary": f"{config.vocab_size:,}, embeddings {'tied' if config.tied else 'not tied'}",
        "positions": f"{config.max_positions:,}",
        "parameters": f"{sum(math.prod(tensor.shape) for tensor in tensors):,}",
        "block parameters": f"{config.all_block_parameters:,}",
        "bytes": f"{sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors):,}",
        "dtypes": ", ".join(f"{name} ({count} tensors)" for name, count in dtypes.items()),
    }
    if masks is not None:
        facts["pruned"] = f"{masks.kept_parameters(config):,} block parameters kept"
    return Inspection(kind="model", facts=facts, widths=widths, full_widths=full)
