"""What each product of an artifact is multiplied with on a text: for the algorithms that round by it."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.family import Family
from dispc.plan import Choices, Plan, make_plan
from dispc.quantisation import HEAD_PRODUCT, product_of
from dispc.runtime.session import Runner, open_session
from dispc.support.arrays import Array, Tokens

PREFIX = "inputs."
Build = Callable[[Checkpoint, Masks, Plan, Path], object]
"""Compiles a checkpoint with masks by a plan into an empty directory."""


def calibrate(checkpoint: Checkpoint, masks: Masks, windows: Tokens, build: Build) -> dict[str, Array]:
    """As `record_inputs`: the model is compiled for the CPU in float32, and reads the text."""
    plan = make_plan("onnx", Choices(without=("fill-zeros",)))
    with tempfile.TemporaryDirectory(prefix="dispc-calibrate-") as scratch:
        build(checkpoint, masks, plan, Path(scratch))
        return record_inputs(Path(scratch) / "model.onnx", checkpoint.family, windows)


def record_inputs(path: Path, family: Family, windows: Tokens) -> dict[str, Array]:
    """The sum of x x^T over the inputs x of each product (`product_of`) of a float32 graph, float32 [K,K].

    `windows` [N,S] are token ids. One matrix for each product stays in memory.
    """
    session = open_session(path, edit=lambda model: _expose(model, family))
    runner, sums = Runner(session), dict[str, Array]()
    for window in windows:
        ids, ones, positions = window[None], np.ones((1, len(window)), dtype=np.int64), np.arange(len(window))[None]
        outputs, _ = runner.run_all(ids, ones, positions, runner.empty_caches(1))
        for name, values in outputs.items():
            if name.startswith(PREFIX):
                rows = values.reshape(-1, values.shape[-1])
                product = name.removeprefix(PREFIX)
                sums[product] = sums.get(product, np.float32(0)) + rows.T @ rows
    return sums


def _expose(model: ir.Model, family: Family) -> None:
    """Make the input of every product an output, in place."""
    graph = model.graph
    for product, value in dict(_products(graph, family)).items():
        out = ir.Value(name=f"{PREFIX}{product}", shape=ir.Shape(["batch", "sequence", None]))
        out.dtype = ir.DataType.FLOAT
        graph.append(ir.node("Identity", [value], name=out.name, outputs=[out]))
        graph.outputs.append(out)


def _products(graph: ir.Graph, family: Family) -> Iterator[tuple[str, ir.Value]]:
    for node in graph:
        value = node.inputs[0] if node.op_type in ("MatMul", "FusedMatMul") else None
        if value is None:
            continue
        weight = node.inputs[1]
        block = weight is not None and (weight.name or "").startswith(f"{family.layers}.")
        yield product_of((weight and weight.name) or "", family) if block else HEAD_PRODUCT, value
