"""The graph is that of the compiler: what differs is found wherever no run would meet it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import faults
import harness
import numpy as np
import onnx_ir as ir
import pytest
from artifacts import artifact, failed, judged

from dispc.quantisation import Quantisation
from dispc.runtime.edits import load_graph
from dispc.validate import CheckOptions
from dispc.validate.checks.check import Check
from dispc.validate.checks.graph import NAME, differences, judge_graph
from dispc.validate.comparison import Comparison


def verdict(out: Path, variant: str) -> Check:
    (found,) = judge_graph(Comparison(out, harness.checkpoint(variant).directory, CheckOptions(device="cpu")))
    return found


def first(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def rename(model: ir.Model) -> None:
    first(model, "MatMul").name = "/other/MatMul"


def repeat_a_name(model: ir.Model) -> None:
    one, other = [node for node in model.graph if node.op_type == "MatMul"][:2]
    one.name = other.name


def another_attribute(model: ir.Model) -> None:
    node = first(model, "GroupQueryAttention")
    node.attributes["scale"] = ir.AttrFloat32("scale", 0.5)


def another_operator(model: ir.Model) -> None:
    first(model, "Mul").op_type = "Add"


def another_input(model: ir.Model) -> None:
    one, other = [node for node in model.graph if node.op_type == "MatMul"][-2:]
    other.replace_input_with(0, one.inputs[0])


def a_node_more(model: ir.Model) -> None:
    faults.behind_logits(model, lambda logits: ir.node("Identity", [logits], name="fault/Identity"))


def another_index(model: ir.Model) -> None:
    name = "model.layers.1.mlp.read"
    faults.replace(model, name, faults.initializer(model, name)[::-1].copy())


def a_value_more(model: ir.Model) -> None:
    faults.constant(model, "fault.more", 1.0)


def wider(model: ir.Model) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    faults.replace(model, name, np.pad(faults.initializer(model, name), ((0, 1), (0, 0))))


def another_opset(model: ir.Model) -> None:
    model.graph.opset_imports[""] += 1


def another_type(model: ir.Model) -> None:
    model.graph.outputs[0].shape = ir.Shape([1, "sequence", 131])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (rename, "no node /model"),
        (rename, "a node /other/MatMul (MatMul)"),
        (repeat_a_name, "is the name of several nodes"),
        (another_attribute, "has other attributes: scale"),
        (another_operator, "has other work: Add, not Mul"),
        (another_input, "has other inputs"),
        (a_node_more, "a node fault/Identity (Identity)"),
        (another_index, "has other values"),
        (a_value_more, "values fault.more"),
        (wider, "model.layers.1.mlp.down_proj.weight is FLOAT"),
        (another_opset, "opsets "),
        (another_type, "other outputs, or of other types"),
    ],
)
def test_whatever_differs_is_named(fault: faults.Fault, says: str) -> None:
    whole, broken = (load_graph(artifact("llama") / "model.onnx") for _ in range(2))
    assert not [*differences(broken, whole)]
    fault(broken)
    assert any(says in each for each in differences(broken, whole))


def clip_the_last_index(model: ir.Model, last: int = 25) -> None:
    """Right for prompts of up to 26 tokens, where that is the `last` index."""
    value = next(node for node in model.graph if (node.name or "") == "/last/Sub").outputs[0]
    most = ir.Value(name="fault.most", const_value=ir.tensor([last], name="fault.most"))
    model.graph.register_initializer(most)
    readers = list(value.uses())
    node = ir.node("Min", [value, most], name="fault/Min")
    model.graph.insert_after(value.producer(), node)  # type: ignore[arg-type]
    for use in readers:
        use.node.replace_input_with(use.idx, node.outputs[0])


def test_a_last_token_that_is_wrong_for_longer_prompts_is_found(tmp_path: Path) -> None:
    whole = artifact("llama", last_logits=True)
    assert verdict(whole, "llama").status == "passed"
    found = verdict(faults.plant(clip_the_last_index, whole, tmp_path / "broken"), "llama")
    assert found.status == "failed" and "fault/Min" in found.detail


def test_the_graph_as_it_is_shipped_runs_long_prompts_too(tmp_path: Path) -> None:
    """The other runs are of a graph without the choice of the last token."""
    clip = partial(clip_the_last_index, last=100)
    broken = faults.plant(clip, artifact("llama", last_logits=True), tmp_path / "broken")
    assert "last logits" in failed(judged(broken, "llama"))


def of_another_release(out: Path) -> None:
    manifest = json.loads((out / "dispc.json").read_text())
    manifest["versions"] |= {"transformers": "4.0", "": "1", "no-such-package": "2"}
    (out / "dispc.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("fault", "status"), [(a_node_more, "noted"), (lambda model: None, "passed")])
def test_another_release_may_spell_a_graph_differently(fault: faults.Fault, status: str, tmp_path: Path) -> None:
    out = faults.plant(fault, artifact("llama"), tmp_path / "out")
    of_another_release(out)
    found = verdict(out, "llama")
    assert found.status == status
    assert ("transformers 4.0, here" in found.detail) == (status == "noted")


def test_choices_that_no_compilation_takes_are_a_failed_check(tmp_path: Path) -> None:
    out = faults.plant(lambda model: None, artifact("llama"), tmp_path / "out")
    manifest = json.loads((out / "dispc.json").read_text())
    manifest["fusions"] = ["luck"]
    (out / "dispc.json").write_text(json.dumps(manifest))
    assert verdict(out, "llama").status == "failed"


def test_another_algorithm_in_dispc_json_is_found(tmp_path: Path) -> None:
    """It decides how near the integers must be to the weights: the graph was made by another."""
    int4 = Quantisation(bits=4, block_size=16, symmetric=False, head=False, embedding=False)
    out = faults.plant(lambda model: None, artifact("llama", quantisation=int4), tmp_path / "out")
    assert verdict(out, "llama").status == "passed"
    manifest = json.loads((out / "dispc.json").read_text())
    manifest["quantisation"]["algorithm"] = "gptq"
    (out / "dispc.json").write_text(json.dumps(manifest))
    found = verdict(out, "llama")
    assert found.status == "failed" and "its passes are" in found.detail


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target": "onnx", "dtype": "bfloat16", "align": 8}),
    ("phi", {"lowering": "zero-filled"}),
    ("opt", {"lowering": "scatter-elements", "without": ("fuse-qkv", "fuse-skip-norm")}),
    ("qwen3", {"target": "onnx-cuda", "dtype": "float16", "cuda_graph": True}),
]


@pytest.mark.parametrize(("variant", "options"), KINDS, ids=str)
def test_every_choice_is_made_again(variant: str, options: dict[str, Any]) -> None:
    found = verdict(artifact(variant, **options), variant)
    assert found.status == "passed", found.detail


def test_validation_reports_it(tmp_path: Path) -> None:
    broken = faults.plant(a_value_more, artifact("llama"), tmp_path / "broken")
    assert NAME in failed(judged(broken, "llama")) and NAME not in failed(judged(broken, "llama", quick=True))
