"""The cosines and sines that an artifact stores, against those of transformers, at every position the model has.

The scenarios reach the last positions only where the context is short or the artifact takes position_ids.
"""

from collections.abc import Iterator
from inspect import signature
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from dispc.model.checkpoint import Checkpoint
from dispc.model.pretrained import build_model
from dispc.runtime.edits import load_graph
from dispc.support.check import Check
from dispc.support.errors import ArtifactError
from dispc.support.graph import MICROSOFT
from dispc.validate.comparison import Comparison

NAME = "rotary tables"
TABLES = {
    ("RotaryEmbedding", ""): (1, 2),
    ("RotaryEmbedding", MICROSOFT): (2, 3),
    ("GroupQueryAttention", MICROSOFT): (7, 8),
}
"""Operator and domain -> where it takes cosines and sines."""
UNITS = 2.0
"""Units in the last place of the stored dtype that a cosine may be off."""


def judge_rotary(comparison: Comparison) -> Iterator[Check]:
    """Largest difference of every table [positions, rotary dimensions / 2], in units of the stored dtype at 1.

    Whatever feeds an operator that rotates is a table, whatever it is called.
    """
    artifact, masks = comparison.artifact, comparison.masks
    try:
        tables = find_tables(load_graph(comparison.directory / "model.onnx"))
    except ArtifactError as error:
        yield Check.failed(NAME, "parity", str(error))
        return
    if not comparison.checkpoint.family.rotary or not any(block.attention.alive for block in masks.blocks):
        if tables:
            yield Check.failed(NAME, "parity", "the graph has them, the reference has no rotary positions")
        else:
            yield Check.skipped(NAME, "parity", "the model has no rotary positions")
        return
    if not tables:
        yield Check.failed(NAME, "parity", "the graph has none, the reference has rotary positions")
        return
    dtype, worst, where = getattr(torch, artifact.dtype), 0.0, ""
    expected = rotary_tables(comparison.checkpoint, artifact.positions)
    for value, (kind, node) in tables.items():
        assert value.const_value is not None
        found = torch.from_numpy(value.const_value.numpy().astype(np.float32))
        if found.shape != expected[0][kind].shape:
            yield Check.failed(NAME, "parity", f"{value.name} of {node} is {list(found.shape)}")
            return
        every = [(found - pair[kind].to(dtype).float()).abs().nan_to_num(float("inf")).amax(dim=1) for pair in expected]
        off = min(every, key=lambda errors: float(errors.max()))  # where blocks have several tables, the likest
        if float(off.max()) > worst:
            worst, where = float(off.max()), f"; worst at position {int(off.argmax())} of {value.name}, for {node}"
    detail = f"{len(tables)} tables of {artifact.positions:,} positions{where}"
    yield Check.against(NAME, "parity", worst / torch.finfo(dtype).eps, UNITS, "units in the last place", detail)


def find_tables(model: ir.Model) -> dict[ir.Value, tuple[int, str]]:
    """Every table of `model` -> 0 for cosines, 1 for sines, and the first node that it is for.

    Raises:
        ArtifactError: when an operator that rotates gets something else.
    """
    tables: dict[ir.Value, tuple[int, str]] = {}
    for node in model.graph:
        for kind, position in enumerate(TABLES.get((node.op_type, node.domain), ())):
            value = node.inputs[position] if position < len(node.inputs) else None
            if value is None:  # GroupQueryAttention behind nodes that rotate
                continue
            table = _stored(value)
            if table is None:
                raise ArtifactError(f"{node.name}: its {('cosines', 'sines')[kind]} are computed, not stored")
            if tables.setdefault(table, (kind, node.name or ""))[0] != kind:
                raise ArtifactError(f"{node.name}: {table.name} is for cosines and for sines")
    return tables


def _stored(value: ir.Value) -> ir.Value | None:
    """The initializer that a value is, behind casts that change nothing."""
    producer = value.producer()
    while producer is not None and producer.op_type in ("Identity", "Cast") and producer.inputs[0] is not None:
        value, producer = producer.inputs[0], producer.inputs[0].producer()
    return value if producer is None and value.const_value is not None else None


@torch.no_grad()
def rotary_tables(checkpoint: Checkpoint, positions: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """cos and sin of every position, float32 [positions, rotary dimensions / 2], for each kind of block with its own.

    They are those of transformers' own modules. On one thread: with several, a first call of torch was once seen to
    give cosines that are off by 1e-4.
    """
    with torch.device("meta"):
        model = build_model(checkpoint.pretrained_config, torch.float32, checkpoint.family.attention)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [table for module in model.modules() for table in _tables_of(module, positions)]
    finally:
        torch.set_num_threads(threads)


def _tables_of(module: Any, positions: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if not type(module).__name__.endswith("RotaryEmbedding"):
        return
    rotary = type(module)(module.config)
    kinds = rotary.layer_types if "layer_type" in signature(rotary.forward).parameters else [None]
    for kind in kinds:
        cos, sin = (x[0] for x in rotary(torch.zeros(1), torch.arange(positions)[None], *([kind] if kind else [])))
        interleaved = torch.equal(cos[:, ::2], cos[:, 1::2])
        kept = slice(0, None, 2) if interleaved else slice(0, cos.shape[1] // 2)
        yield cos[:, kept], sin[:, kept]
