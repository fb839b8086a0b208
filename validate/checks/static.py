"""What is checked without running the graph: onnx.checker, operator sets, and where its nodes are placed."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from dispc.support.check import Check
from dispc.support.errors import ArtifactError, first_line
from dispc.support.graph import MACHINE_LEARNING, MICROSOFT, without_links
from dispc.support.onnx_checker import check_model
from dispc.targets import TARGETS
from dispc.validate.comparison import Comparison

ONNX_RUNTIME = {"", MICROSOFT, MACHINE_LEARNING}
"""The operator domains that ONNX Runtime knows."""


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


def judge_placement(comparison: Comparison) -> Iterator[Check]:
    """ONNX Runtime's own records: no node away from the provider but shape arithmetic, and no copy."""
    yield comparison.placement[1]
