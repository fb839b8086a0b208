"""What the tests of passes and compiler share: tiny checkpoints and their traces made once, graphs run in memory."""

import atexit
import copy
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import tiny
import torch

from dispc.export.trace import trace
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.passes.pipeline import build_pipeline, run_pipeline
from dispc.plan import Choices, make_plan
from dispc.quantisation import Quantisation
from dispc.reference.blocks import Blocks
from dispc.reference.masked import load_reference, mask_forward
from dispc.reference.quantised import quantise_reference
from dispc.reference.truth import Text, ask
from dispc.runtime.session import Runner, open_session
from dispc.validate.checks.parity import measure
from dispc.validate.client import Batch, Row

Array = npt.NDArray[Any]
TOLERANCE = 1e-5
"""What float32 graphs of the tiny models may differ from torch by, as a share of the range of the logits."""
TOKENS = np.random.default_rng(7).integers(0, 131, 13)


@cache
def scratch() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="dispc-tests-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@cache
def checkpoint(variant: str) -> Checkpoint:
    return Checkpoint(tiny.make_model(variant, scratch() / variant))


@cache
def _traced(variant: str) -> ir.Model:
    return trace(checkpoint(variant), torch.float32)


def traced(variant: str) -> ir.Model:
    """A fresh copy of the variant's float32 trace."""
    return _traced(variant).clone()


def graph_of(model: Checkpoint, masks: Masks, target: str = "onnx-cpu", **options: Any) -> ir.Model:
    """The float32 graph of any checkpoint after the whole pipeline."""
    graph = trace(model, torch.float32)
    run_pipeline(graph, build_pipeline(make_plan(target, Choices(**options)), model, masks))
    return graph


def rewritten(variant: str, masks: Masks, target: str = "onnx-cpu", **options: Any) -> ir.Model:
    """The variant's graph after the whole pipeline, its trace made once."""
    model = traced(variant)
    run_pipeline(model, build_pipeline(make_plan(target, Choices(**options)), checkpoint(variant), masks))
    return model


@cache
def _dense_reference(variant: str) -> Any:
    return load_reference(checkpoint(variant), None)


def reference_logits(
    variant: str, masks: Masks | None, tokens: Array = TOKENS, quantisation: Quantisation | None = None
) -> Array:
    """Logits [S,V] of the torch reference."""
    return reference_rows(variant, masks, [tokens], quantisation)[0]


def reference_rows(
    variant: str, masks: Masks | None, rows: Sequence[Array], quantisation: Quantisation | None = None
) -> list[Array]:
    """The same of several prompts, each by itself."""
    model = copy.deepcopy(_dense_reference(variant))
    if masks is not None:
        mask_forward(model, checkpoint(variant).family, masks)
        if quantisation is not None:
            quantise_reference(model, checkpoint(variant).family, masks, quantisation, torch.float32)
    return rows_of(model, rows)


def times_own(
    variant: str,
    masks: Masks,
    rows: Sequence[Array],
    found: Sequence[Array],
    quantisation: Quantisation | None = None,
    at: Sequence[int] | None = None,
) -> float:
    """The largest error of `found` logits [S,V], in units of what float32 costs the reference at that position.

    `at` are their token indices, all where it is None. What is right stays below `DEFAULTS.error`: a norm over few
    positions amplifies any rounding, the reference's too, so no fixed tolerance is right for every width.
    """
    model = copy.deepcopy(_dense_reference(variant))
    mask_forward(model, checkpoint(variant).family, masks)
    if quantisation is not None:
        quantise_reference(model, checkpoint(variant).family, masks, quantisation, torch.float32)
    texts = [Text(tuple(tokens.tolist())) for tokens in rows]
    answers = ask(Blocks(model, checkpoint(variant).config), texts, torch.float64, "float32")
    compared = [
        Row(text, np.arange(len(text.tokens)) if at is None else np.array(at), {"logits": logits})
        for text, logits in zip(texts, found, strict=True)
    ]
    return max(float(distance.ratio.max()) for distance in measure(compared, answers))


def rows_of(model: Any, rows: Sequence[Array]) -> list[Array]:
    """float32 logits [S,V] that a torch model gives each prompt by itself."""
    with torch.inference_mode():
        return [model(input_ids=torch.from_numpy(tokens)[None]).logits[0].float().numpy() for tokens in rows]


def model_logits(model: ir.Model, tokens: Array = TOKENS, *, optimise: bool = False) -> Array:
    """Logits [S,V] of a graph in ONNX Runtime: one run for the first tokens, one for the rest after the cache."""
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        path = Path(directory) / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        runner = Runner(open_session(path, optimise=optimise))
    caches, found = runner.empty_caches(1), []
    for start, end in ((0, 5), (5, len(tokens))):
        ones, positions = np.ones((1, end), dtype=np.int64), np.arange(start, end)[None]
        logits, caches = runner.run(tokens[None, start:end], ones, positions, caches)
        found.append(logits[0])
    return np.concatenate(found)


def batch_logits(model: ir.Model, rows: Sequence[Array], padding: str) -> list[Array]:
    """Logits [S,V] of each row of a batch: all but its last token in a padded prompt, that one after the cache."""
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        path = Path(directory) / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        runner = Runner(open_session(path, optimise=False))
    batch = Batch(runner, rows, padding, compact=padding == "right")
    batch.prefill([len(tokens) - 1 for tokens in rows]).extend()
    return [row.outputs["logits"] for row in batch.outputs()]


def operators(model: ir.Model, within: str = "") -> list[str]:
    """Operator names of the nodes whose name contains `within`, in order."""
    return [node.op_type for node in model.graph if within in (node.name or "")]


def node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.name == name)
