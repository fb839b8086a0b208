"""The embeddings that an artifact stores, row by row, against the checkpoint's: the scenarios look up few of them."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dispc.model.checkpoint import Checkpoint
from dispc.reference.quantised import read_integers, round_embedding
from dispc.runtime.session import Artifact
from dispc.support.arrays import Array, Tokens
from dispc.support.dtypes import DTYPES
from dispc.support.errors import ArtifactError
from dispc.validate.checks.check import Check
from dispc.validate.comparison import Comparison
from dispc.validate.streams import first_stream

NAME, OUTPUT = "embeddings", "embedded"
LONGEST = 4096
"""Tokens looked up at once."""
UNITS = 2.0
"""Units in the last place of the dtype, at the largest number of a row, that the row may be off."""


def judge_embeddings(comparison: Comparison) -> Iterator[Check]:
    """Every token and, where positions are learned, every position: the stream before the first sub-layer.

    The graph is cut off there and run on the CPU.
    """
    checkpoint = comparison.checkpoint
    try:
        artifact = Artifact(comparison.directory, edit=cut_behind_embeddings)
        worst, token = _worst_row(artifact, comparison)
    except ArtifactError as error:
        yield Check.failed(NAME, "parity", str(error))
        return
    detail = f"{checkpoint.config.vocab_size:,} tokens; worst at token {token}"
    yield Check.against(NAME, "parity", worst, UNITS, "units in the last place", detail)


def cut_behind_embeddings(model: ir.Model) -> None:
    """Leave the stream before the first sub-layer as the only output, and the nodes that it takes."""
    stream = first_stream(model)
    cast = ir.node("Cast", [stream], {"to": ir.DataType.FLOAT}, name=f"{OUTPUT}/Cast")
    cast.outputs[0].name, cast.outputs[0].dtype = OUTPUT, ir.DataType.FLOAT
    model.graph.append(cast)
    model.graph.outputs[:] = [cast.outputs[0]]
    RemoveUnusedNodesPass()(model)


def _worst_row(artifact: Artifact, comparison: Comparison) -> tuple[float, int]:
    """The largest error of a row, in units in the last place, and its token."""
    checkpoint = comparison.checkpoint
    tokens = _read(checkpoint, f"{checkpoint.family.embedding}.weight")
    learned = f"{checkpoint.family.embedding.rpartition('.')[0]}.embed_positions.weight"
    stored = {learned, learned.removeprefix("model.")} & set(checkpoint.tensors)
    places = _read(checkpoint, learned) if stored else None
    dtype, quantisation = DTYPES[artifact.dtype].torch, artifact.manifest.quantisation
    if quantisation and quantisation.embedding:
        integers = read_integers(quantisation, comparison.graph, checkpoint.family)
        tokens = tokens.float()
        round_embedding(tokens, quantisation, tied=checkpoint.config.tied, dtype=dtype, integers=integers)
    size = min(artifact.positions, LONGEST) if places is None else artifact.positions
    lookups = max(len(tokens), 0 if places is None else artifact.positions)
    worst, where = -1.0, 0
    for start in range(0, lookups, size):
        ids = torch.arange(start, min(start + size, lookups)) % len(tokens)
        expected = tokens[ids].to(dtype)
        expected = expected.float()
        expected = expected * torch.tensor(checkpoint.config.embedding_multiplier).to(dtype).float()
        if places is not None:  # its first rows are for padding
            expected = expected + places[len(places) - artifact.positions :][: len(ids)].to(dtype).float()
        rows = torch.from_numpy(_look_up(artifact, ids.numpy()))
        error = (rows - expected).abs().nan_to_num(float("inf")).amax(dim=1)
        units = error / (torch.finfo(dtype).eps * expected.abs().amax(dim=1).clamp(min=torch.finfo(dtype).tiny))
        if float(units.max()) > worst:
            worst, where = float(units.max()), int(ids[units.argmax()])
    return worst, where


def _look_up(artifact: Artifact, ids: Tokens) -> Array:
    """The embeddings of token ids [n] at the positions from 0 on, by the graph: [n, hidden_size]."""
    runner, row = artifact.runner, ids[None]
    outputs, _ = runner.run_all(row, np.ones_like(row), np.arange(len(ids))[None], runner.empty_caches(1))
    rows: Array = outputs[OUTPUT][0]
    return rows


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A whole table, as it is stored."""
    table: torch.Tensor = checkpoint.find(name).read()
    return table
