"""What is checked without running the graph: onnx.checker, operator sets, inputs and outputs."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from dispc.runtime.edits import load_graph
from dispc.support.errors import ArtifactError, first_line
from dispc.support.graph import MACHINE_LEARNING, MICROSOFT, consumers, without_links
from dispc.support.onnx_checker import check_model
from dispc.targets import TARGETS
from dispc.validate.checks.check import Check
from dispc.validate.comparison import Comparison
from dispc.validate.streams import first_stream

ONNX_RUNTIME = {"", MICROSOFT, MACHINE_LEARNING}
"""The operator domains that ONNX Runtime knows."""
INTERFACE = "inputs and outputs"
ROTATING = ("RotaryEmbedding", "GroupQueryAttention")


def judge_file(comparison: Comparison) -> Iterator[Check]:
    """onnx.checker with full shape inference, and no operator from a domain that the target's runtimes lack."""
    yield check_file(comparison.directory / "model.onnx", comparison.target)


def check_file(path: Path, target: str) -> Check:
    try:
        with without_links(path) as plain:
            check_model(plain)
        model = onnx.load(path, load_external_data=False)
    except (ArtifactError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError, DecodeError) as error:
        return Check.failed("onnx.checker", "static", f"refuses the model: {first_line(error)}")
    operators = Counter(f"{node.domain}.{node.op_type}".removeprefix(".") for node in model.graph.node)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    known = ONNX_RUNTIME if target not in TARGETS or TARGETS[target].contrib else {""}
    unknown = sorted({node.domain for node in model.graph.node} - known)
    unlisted = sorted({node.domain for node in model.graph.node} - set(opsets))
    spelled = ", ".join(f"{domain or 'ai.onnx'} {number}" for domain, number in opsets.items())
    detail = f"IR {model.ir_version}; opsets {spelled}; {len(model.graph.node)} nodes"
    for domains, fault in ((unknown, f"target {target} does not know"), (unlisted, "opset_import lacks")):
        if domains:
            return Check.failed("onnx.checker", "static", f"{fault} the domain {', '.join(domains)}; {detail}")
    figures = {"ir_version": model.ir_version, "opsets": opsets, "operators": dict(operators.most_common())}
    return Check(name="onnx.checker", group="static", status="passed", detail=detail, figures=figures)


def judge_interface(comparison: Comparison) -> Iterator[Check]:
    """The graph has the inputs and outputs that dispc gives it and no others, and reads tokens and positions where
    every row of the tables is compared."""
    try:
        model = load_graph(comparison.directory / "model.onnx")
        faults = [*_interface(model, comparison.masks.cache_layers), *_strays(model)]
    except ArtifactError as error:
        faults = [str(error)]
    if faults:
        yield Check.failed(INTERFACE, "static", "; ".join(faults))
    else:
        detail = "those of a decoder; token ids and positions are looked up, and nothing else depends on them"
        yield Check(name=INTERFACE, group="static", status="passed", detail=detail)


def _interface(model: ir.Model, cache_layers: int) -> Iterator[str]:
    """Inputs and outputs that are missing, or are too many."""
    caches = [f"{layer}.{part}" for layer in range(cache_layers) for part in ("key", "value")]
    needed = {"input_ids", "attention_mask", *(f"past_key_values.{cache}" for cache in caches)}
    inputs = {value.name or "" for value in model.graph.inputs}
    outputs, given = {value.name or "" for value in model.graph.outputs}, {"logits", *(f"present.{c}" for c in caches)}
    yield from (f"no input {name}" for name in sorted(needed - inputs))
    yield from (f"an input {name}" for name in sorted(inputs - needed - {"position_ids"}))
    yield from (f"no output {name}" for name in sorted(given - outputs))
    yield from (f"an output {name}" for name in sorted(outputs - given))


def _strays(model: ir.Model) -> Iterator[str]:
    """Ways from input_ids or position_ids to an output that go past the embeddings and past what rotates.

    What is wrong for a single token or position alone stands in a table, then, and those are compared row by row: no
    scenario feeds every token.
    """
    stream, inputs = first_stream(model), {value.name: value for value in model.graph.inputs}
    for name in ("input_ids", "position_ids"):
        pending = [inputs[name]] if name in inputs else []
        reached = set(pending)
        while pending:
            value = pending.pop()
            if value.is_graph_output():
                yield f"{value.name} depends on {name} otherwise than through a lookup"
                break
            for node in consumers(value):
                if not _reads_shape_alone(node) and node.op_type not in ROTATING:
                    further = {*node.outputs} - reached - {stream}
                    reached |= further
                    pending += further


def _reads_shape_alone(node: ir.Node) -> bool:
    """Shape, or a comparison of a value with itself, which is how dispc makes a tensor of ones."""
    return node.op_type == "Shape" or (node.op_type == "Equal" and node.inputs[0] is node.inputs[1])
