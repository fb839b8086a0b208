"""The graph beside the one that this dispc writes for the same model, masks and choices.

A run shows a graph at some lengths and batch sizes. One that is wrong only at others differs in its nodes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from dispc.support.errors import DispcError
from dispc.support.graph import read_model
from dispc.support.version import __version__
from dispc.validate.checks.check import Check, listed
from dispc.validate.checks.rewriting import PASSES, failed_or_noted, needed, rewritten
from dispc.validate.comparison import Comparison

NAME = "graph"
EXACT = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}
"""Tensors whose values are compared: index sets and shapes. The check of the weights compares the others."""


def judge_graph(comparison: Comparison) -> Iterator[Check]:
    """Node for node the graph that a compilation makes, with its index sets: no other path for any length or batch.

    Another release of what traces may spell the same differently: a difference is noted then, and not judged.
    """
    try:
        found, expected = comparison.graph(), rewritten(comparison)
        faults = [*_never_written(read_model(comparison.directory / "model.onnx")), *differences(found, expected)]
        if found.metadata_props.get(PASSES) != expected.metadata_props[PASSES]:
            faults.append(f"its passes are {found.metadata_props.get(PASSES)}, not {expected.metadata_props[PASSES]}")
        stored, needs = comparison.manifest.to_json()["needs"], needed(expected)
        faults += [
            f"needs.{name} is {stored[name]}, it needs {least}"
            for name, least in needs.items()
            if stored[name] != least
        ]
    except DispcError as error:
        faults = [str(error)]
    if faults:
        what = f"not what dispc {__version__} writes for this model: {listed(faults)}"
        yield failed_or_noted(NAME, what, comparison)
    else:
        detail = f"{len(expected.graph)} nodes are those that dispc {__version__} writes"
        yield Check(name=NAME, group="static", status="passed", detail=detail)


def differences(found: ir.Model, expected: ir.Model) -> Iterator[str]:
    """What `found` has otherwise than `expected`, nodes and values by name."""
    if dict(found.graph.metadata_props) != dict(expected.graph.metadata_props):
        yield "other metadata of the graph"
    if found.ir_version != expected.ir_version:
        yield f"IR version {found.ir_version} instead of {expected.ir_version}"
    if found.opset_imports != expected.opset_imports:
        yield f"opsets {dict(found.opset_imports)} instead of {dict(expected.opset_imports)}"
    for what, ours, theirs in (
        ("inputs", found.graph.inputs, expected.graph.inputs),
        ("outputs", found.graph.outputs, expected.graph.outputs),
    ):
        if [_typed(value) for value in ours] != [_typed(value) for value in theirs]:
            yield f"other {what}, or of other types"
    yield from _nodes(found.graph, expected.graph)
    yield from _initializers(found.graph.initializers, expected.graph.initializers)


def _nodes(found: ir.Graph, expected: ir.Graph) -> Iterator[str]:
    ours, theirs = ({node.name or "": ir.to_proto(node) for node in graph} for graph in (found, expected))
    repeated = [name for name, times in Counter(node.name for node in found).items() if times > 1]
    yield from (f"{times} is the name of several nodes" for times in repeated)
    yield from (f"no node {name}" for name in theirs if name not in ours)
    yield from (f"a node {name} ({ours[name].op_type})" for name in ours if name not in theirs)
    for name in (name for name in theirs if name in ours):
        if what := _differs(ours[name], theirs[name]):
            yield f"{name} has other {what}"


def _differs(ours: onnx.NodeProto, theirs: onnx.NodeProto) -> str:
    """The first thing in which two nodes differ; empty where they are the same."""
    if (ours.domain, ours.op_type) != (theirs.domain, theirs.op_type):
        return f"work: {ours.op_type}, not {theirs.op_type}"
    if list(ours.input) != list(theirs.input):
        return "inputs"
    if list(ours.output) != list(theirs.output):
        return "outputs"
    if _said(ours) != _said(theirs):
        return "metadata"
    mine, other = ({attribute.name: attribute for attribute in node.attribute} for node in (ours, theirs))
    differing = sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))
    return f"attributes: {', '.join(differing)}" if differing else ""


def _said(node: onnx.NodeProto) -> tuple[str, dict[str, str]]:
    return node.doc_string, {entry.key: entry.value for entry in node.metadata_props}


def _never_written(model: onnx.ModelProto) -> Iterator[str]:
    """What is in no model of dispc's; which of two opsets is meant, readers disagree."""
    graph = model.graph
    for what, has in (
        ("functions", model.functions),
        ("training", model.training_info),
        ("sparse weights", graph.sparse_initializer),
        ("annotations of quantised tensors", graph.quantization_annotation),
        ("a text", model.doc_string or graph.doc_string),
    ):
        if has:
            yield f"it has {what} of its own"
    for domain, times in Counter(entry.domain for entry in model.opset_import).items():
        if times > 1:
            yield f"{times} opsets of {domain or 'ai.onnx'}"


def _initializers(found: Mapping[str, ir.Value], expected: Mapping[str, ir.Value]) -> Iterator[str]:
    yield from (f"no values {name}" for name in expected if name not in found)
    yield from (f"values {name}" for name in found if name not in expected)
    for name in (name for name in expected if name in found):
        ours, theirs = found[name].const_value, expected[name].const_value
        assert ours is not None and theirs is not None
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            yield f"{name} is {ours.dtype}{ours.shape}, not {theirs.dtype}{theirs.shape}"
        elif (ours.dtype in EXACT or ours.size == 1) and not np.array_equal(ours.numpy(), theirs.numpy()):
            yield f"{name} has other values"


def _typed(value: ir.Value) -> tuple[str, str, str]:
    return value.name or "", str(value.dtype), str(value.shape)
