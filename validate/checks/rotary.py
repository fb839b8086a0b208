"""The cosines and sines that an artifact stores, against those of transformers, at every position the model has.

The scenarios reach the last positions only where the context is short or the artifact takes position_ids.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from dispc.support.dtypes import DTYPES
from dispc.support.errors import ArtifactError
from dispc.support.graph import MICROSOFT
from dispc.validate.checks.check import Check
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
        tables = find_tables(comparison.graph())
    except ArtifactError as error:
        yield Check.failed(NAME, "parity", str(error))
        return
    config = comparison.checkpoint.config
    if not any(block.attention.alive and config.rotates(index) for index, block in enumerate(masks.blocks)):
        if tables:
            yield Check.failed(NAME, "parity", "the graph has them, no attention of the reference that is left rotates")
        else:
            yield Check.skipped(NAME, "parity", "no attention that is left rotates")
        return
    if not tables:
        yield Check.failed(NAME, "parity", "the graph has none, the reference has rotary positions")
        return
    dtype, worst, where = DTYPES[artifact.dtype].torch, 0.0, ""
    expected = rotary_tables(comparison.checkpoint.empty_model(torch.float32), config.max_positions)
    for value, (kind, node) in tables.items():
        assert value.const_value is not None
        table = torch.from_numpy(value.const_value.numpy().astype(np.float32))
        fitting = [pair[kind].to(dtype).float() for pair in expected if pair[kind].shape == table.shape]
        if not fitting:
            yield Check.failed(NAME, "parity", f"{value.name} of {node} is {list(table.shape)}")
            return
        errors = [(table - wanted).abs().nan_to_num(float("inf")).amax(dim=1) for wanted in fitting]
        off = min(errors, key=lambda error: float(error.max()))
        if float(off.max()) > worst:
            worst, where = float(off.max()), f"; worst at position {int(off.argmax())} of {value.name}, for {node}"
    detail = f"{len(tables)} tables of {config.max_positions:,} positions{where}"
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
            if value is None:  # GroupQueryAttention after nodes that rotate
                continue
            table = _stored(value)
            if table is None:
                raise ArtifactError(f"{node.name}: its {('cosines', 'sines')[kind]} are computed, not stored")
            if tables.setdefault(table, (kind, node.name or ""))[0] != kind:
                raise ArtifactError(f"{node.name}: {table.name} is for cosines and for sines")
    return tables


def _stored(value: ir.Value) -> ir.Value | None:
    """The initializer that a value is, after casts that change nothing."""
    producer = value.producer()
    while producer is not None and producer.op_type in ("Identity", "Cast") and producer.inputs[0] is not None:
        value, producer = producer.inputs[0], producer.inputs[0].producer()
    return value if producer is None and value.const_value is not None else None


@torch.no_grad()
def rotary_tables(model: nn.Module, positions: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """cos and sin [positions, rotary dimensions / 2], float32, of every set of frequencies that transformers has.

    Multiplied out in float32, as transformers does. A family may have one set for blocks that attend to everything and
    one for those with a sliding window.
    """
    tables = []
    for name, frequencies in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf.endswith("inv_freq") and "original" not in leaf:
            scaling = getattr(model.get_submodule(owner), leaf.replace("inv_freq", "attention_scaling"), 1.0)
            angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies.float()[None]
            tables.append((angles.cos() * scaling, angles.sin() * scaling))
    return tables
