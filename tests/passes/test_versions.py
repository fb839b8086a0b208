"""The opset is the lowest that the graph needs, and the ONNX Runtime the first that has its operators."""

import re
from pathlib import Path

import harness
import onnx
import onnx_ir as ir
import pytest
import tiny
from onnx import helper

from dispc.manifest import Needs
from dispc.masks import Masks
from dispc.passes.common.versions import KERNELS, RELEASES, lowest_opset, needs, version_key
from dispc.quantisation import Quantisation, make_quantisation
from dispc.support.errors import CompileError
from dispc.support.graph import MICROSOFT, make_node
from dispc.support.onnx_checker import check_model
from dispc.targets import TARGETS

INT4 = Quantisation(bits=4, block_size=16, symmetric=True, head=False, embedding=False)


def rewritten(variant: str, **options: object) -> ir.Model:
    masks = Masks.random(harness.checkpoint(variant).config, 0.4, 3)
    return harness.rewritten(variant, masks, **options)  # type: ignore[arg-type]


def op(
    op_type: str, inputs: int = 1, *, domain: str = "", dtype: ir.DataType | None = None, **attributes: int
) -> ir.Node:
    values = [ir.Value(name=f"x{i}", type=ir.TensorType(dtype) if dtype else None) for i in range(inputs)]
    return make_node(op_type, values, op_type, domain=domain, attributes=attributes)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_artifacts_with_operators_of_onnx_runtime_stay_at_the_lowest_opset(variant: str, padding: str) -> None:
    model = rewritten(variant, padding=padding)
    assert (model.opset_imports[""], model.ir_version) == (21, 10)
    assert not {"RMSNormalization", "Attention"} & {node.op_type for node in model.graph}


def test_standard_operators_need_the_opset_that_has_them() -> None:
    model = rewritten("llama", target="onnx")
    assert needs(model) == Needs(opset=23, ir_version=10, onnxruntime="1.24")
    assert {node.domain for node in model.graph} == {""}


@pytest.mark.parametrize("variant", ["llama", "phi", "opt"])
@pytest.mark.parametrize("target", TARGETS)
def test_no_lower_opset_has_these_operators(variant: str, target: str) -> None:
    """onnx.checker takes the graph as it is; with the opset one lower it refuses what made it that high."""
    model = rewritten(variant, target=target)
    opset = model.opset_imports[""]
    path = harness.scratch() / f"versions-{variant}-{target}.onnx"
    for number, accepted in ((opset, True), (opset - 1, opset == min(RELEASES))):
        model.opset_imports[""] = number
        ir.save(model, path, external_data=f"{path.name}.data")
        if accepted:
            check_model(path)
        else:
            with pytest.raises((onnx.checker.ValidationError, onnx.shape_inference.InferenceError)):
                check_model(path)


@pytest.mark.parametrize(
    ("node", "opset"),
    [
        (op("Relu"), 21),
        (op("Reshape", 2), 21),
        (op("Attention", 3), 23),
        (op("RMSNormalization", 2), 23),
        (op("Reshape", 2, of=ir.DataType.FLOAT4E2M1), 23),  # a type that the operator took on there
        (op("Cast", to=1, saturate=1), 21),
        (op("GroupQueryAttention", 9, domain=MICROSOFT), 21),
    ],
)
def test_the_opset_follows_from_operator_attributes_inputs_and_types(node: ir.Node, opset: int) -> None:
    assert lowest_opset([op("MatMul", 2), node]) == opset


@pytest.mark.parametrize(
    ("options", "version"),
    [
        ({}, "1.18"),
        ({"padding": "left"}, "1.22"),
        ({"target": "onnx"}, "1.24"),
        ({"target": "onnx-cuda"}, "1.18"),
        ({"target": "onnx-cuda", "dtype": "float32"}, "1.24"),
        ({"quantisation": INT4}, "1.18"),
        ({"quantisation": Quantisation(**INT4.as_dict() | {"int8_activations": True})}, "1.19"),
        ({"quantisation": Quantisation(**INT4.as_dict() | {"bits": 8, "int8_activations": True})}, "1.22"),
        ({"quantisation": Quantisation(**INT4.as_dict() | {"bits": 8})}, "1.23"),
        ({"quantisation": Quantisation(**INT4.as_dict() | {"embedding": True})}, "1.23"),
        ({"quantisation": Quantisation(**INT4.as_dict() | {"embedding": True, "symmetric": False})}, "1.27"),
    ],
)
def test_the_first_onnx_runtime_follows_from_what_operators_are_asked(options: dict[str, object], version: str) -> None:
    assert needs(rewritten("llama", **options)).onnxruntime == version


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_sliding_window_needs_a_newer_onnx_runtime_where_the_operator_applies_it(padding: str) -> None:
    """With padding on the left the mask holds the window."""
    found = needs(rewritten("mistral-window", padding=padding)).onnxruntime
    assert found == {"right": "1.24", "left": "1.22"}[padding]


def test_an_operator_that_no_row_knows_is_an_error() -> None:
    model = rewritten("llama")
    model.graph.append(op("Inverse", domain=MICROSOFT))
    with pytest.raises(CompileError, match=r"Inverse: no row of KERNELS"):
        needs(model)


def test_every_row_beyond_the_oldest_version_says_why() -> None:
    oldest = min((row.onnxruntime for row in RELEASES.values()), key=version_key)
    assert all(row.because for row in KERNELS if row.onnxruntime != oldest)


def test_the_checker_knows_the_norm_only_while_it_looks() -> None:
    model = rewritten("llama")
    assert "SimplifiedLayerNormalization" in {node.op_type for node in model.graph}
    path = harness.scratch() / "versions-checker.onnx"
    ir.save(model, path, external_data=f"{path.name}.data")
    check_model(path)
    with pytest.raises(onnx.checker.ValidationError, match="No Op registered for SimplifiedLayerNormalization"):
        onnx.checker.check_model(str(path))


def test_the_checker_still_refuses_what_is_wrong() -> None:
    node = helper.make_node("SimplifiedLayerNormalization", ["x"], ["y"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph([node], "g", [value("x", 1, [2])], [value("y", 1, [2])])
    path = harness.scratch() / "versions-wrong.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    with pytest.raises(onnx.checker.ValidationError, match="input size 1"):
        check_model(path)


VARIANTS = {"window": "mistral-window", "softcap": "gemma2", "rotates part": "stablelm", "without bias": "cohere"}
"""What a row of the table says of a model, and one that is such."""


def test_the_documentation_names_the_first_onnx_runtime_of_each_artifact() -> None:
    page = (Path(__file__).parents[2] / "docs" / "applications.md").read_text(encoding="utf-8")
    rows = page.split("| first ONNX Runtime |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:3]] for row in rows]
    assert len(cells) > 8
    for artifacts, version in cells:
        variant = next((variant for word, variant in VARIANTS.items() if word in artifacts), "llama")
        for line in re.findall(r"`([^`]+)`", artifacts):
            assert needs(rewritten(variant, **options_of(line))).onnxruntime == version, line


def options_of(line: str) -> dict[str, object]:
    """`onnx-cpu --padding left` as what the plan is made of."""
    target, *words = line.split()
    given = dict(zip(words, [*words[1:], ""], strict=False))
    options: dict[str, object] = {"target": target}
    options |= {name: given[f"--{name}"] for name in ("padding", "dtype") if f"--{name}" in given}
    if "--quantize" in given:
        chosen = [
            value for flag, value in (("--int8-activations", True), ("--no-int8-activations", False)) if flag in given
        ]
        options["quantisation"] = make_quantisation(
            given["--quantize"],
            target,
            block_size=16,
            asymmetric="--asymmetric" in given,
            head=False,
            embedding="--quantize-embedding" in given,
            int8_activations=chosen[0] if chosen else None,
        )
    return options
