"""`dispc inspect`: its figures are those of the files, its tables hold what its JSON holds."""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import command
import harness
import numpy as np
import onnx
import pytest
import tiny
from command import assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from dispc.inspect import inspect_path
from dispc.masks import SETS, Block, Masks, SubLayer
from dispc.model.checkpoint import Checkpoint
from dispc.support.typed_json import to_json


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with masks in `model`, its artifact in `artifact`."""
    place = tmp_path_factory.mktemp("inspect")
    model = tiny.make_model("qwen2", place / "model")
    config = Checkpoint(model).config
    Masks.random(config, 0.5, 1, norm_scope="selected").save(model / "masks.safetensors", config)
    outcome = command.run("compile", model, "-t", "onnx-cpu", "-o", place / "artifact", "--no-validate")
    assert outcome.code == 0, outcome
    return place


@pytest.mark.parametrize("path", ["model", "model/masks.safetensors", "artifact"])
def test_the_table_says_what_the_json_says(path: str, place: Path) -> None:
    table, report = command.run("inspect", place / path), command.run("inspect", place / path, "--json")
    assert (table.code, report.code, table.err, report.err) == (0, 0, "", "")
    facts = json.loads(report.out)
    assert facts == to_json(inspect_path(place / path))
    for name, fact in facts["facts"].items():
        assert name in table.out
        assert str(fact)[:40] in table.out
    for row in facts.get("widths", []):
        assert all(str(width) in table.out for width in row.values())
    for operator in facts.get("operators", {}):
        assert operator in table.out


@pytest.mark.parametrize("path", ["model/masks.safetensors", "artifact"])
def test_widths_are_those_of_the_masks(path: str, place: Path) -> None:
    masks, found = Masks.load(place / "model" / "masks.safetensors"), inspect_path(place / path)
    assert found.widths == [{name: len(block.sets()[name]) for name in SETS} for block in masks.blocks]
    assert found.full_widths == {name: 88 if name == "mlp.mid" else 48 for name in SETS}
    digest = found.facts["sha256"] if found.kind == "masks" else found.manifest["masks_sha256"]
    assert digest == masks.sha256()


def test_the_facts_of_an_artifact_are_those_of_its_files(place: Path) -> None:
    found = inspect_path(place / "artifact")
    graph = onnx.load(place / "artifact" / "model.onnx", load_external_data=False).graph
    assert sum(found.operators.values()) == found.manifest["nodes"] == len(graph.node)
    assert found.operators["MatMul"] == Counter(node.op_type for node in graph.node)["MatMul"]
    assert found.operators["com.microsoft.GroupQueryAttention"] == 3
    assert found.facts["validation"] == "not run"
    config = Checkpoint(place / "model").config
    kept = Masks.load(place / "model" / "masks.safetensors").kept_parameters(config)
    assert f"{kept:,} of {config.block_parameters * 3:,}" in found.facts["block parameters"]


def test_operators_are_listed_block_by_block(place: Path) -> None:
    found = inspect_path(place / "artifact")
    *blocks, outside = found.block_operators
    assert len(blocks) == 3
    assert all(block["GroupQueryAttention"] == 1 for block in blocks)
    assert sum(sum(row.values()) for row in (*blocks, outside)) == found.manifest["nodes"]
    shown = command.run("inspect", place / "artifact", "--ops")
    assert shown.code == 0
    assert "Operators per block" in shown.out
    assert "Operators per block" not in command.run("inspect", place / "artifact").out


def test_widths_are_drawn_of_masks_wherever_they_stand(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for path in ("model", "model/masks.safetensors", "artifact"):
        assert command.run("inspect", place / path, "--plot", tmp_path / "w.svg").code == 0, path
    bare = shutil.copytree(place / "model", tmp_path / "bare")
    (bare / "masks.safetensors").unlink()
    outcome = command.run("inspect", bare, "--plot", tmp_path / "w.svg")
    assert outcome.code == 2 and "masks.safetensors: no such mask file" in outcome.err.replace("\n", "")


def test_a_block_that_is_pruned_away_has_an_empty_row(place: Path, tmp_path: Path) -> None:
    config = Checkpoint(place / "model").config
    whole = Masks.load(place / "model" / "masks.safetensors")
    nothing = np.zeros(0, dtype=np.int64)
    dead = Block(SubLayer(nothing, nothing), SubLayer(nothing, nothing, nothing))
    masks = dataclasses.replace(whole, blocks=(whole.blocks[0], dead, whole.blocks[2]))
    masks.save(tmp_path / "masks.safetensors", config)
    line = ("compile", place / "model", "--masks", tmp_path / "masks.safetensors", "-t", "onnx-cpu", "--no-validate")
    assert command.run(*line, "-o", tmp_path / "out").code == 0
    first, second, third, _ = inspect_path(tmp_path / "out").block_operators
    assert second == {} and first["GroupQueryAttention"] == third["GroupQueryAttention"] == 1


def test_the_facts_of_a_model_are_those_of_its_weights(place: Path) -> None:
    facts = inspect_path(place / "model").facts
    state = load_file(place / "model" / "model.safetensors")
    assert facts["blocks"] == 3
    assert facts["block parameters"] == f"{Checkpoint(place / 'model').config.block_parameters * 3:,}"
    assert facts["parameters"] == f"{sum(tensor.numel() for tensor in state.values()):,}"
    assert facts["bytes"] == f"{sum(tensor.nbytes for tensor in state.values()):,}"
    assert facts["dtypes"] == f"float32 ({len(state)} tensors)"


def test_a_validated_artifact_says_so(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "artifact", tmp_path / "artifact")
    manifest = json.loads((tmp_path / "artifact" / "dispc.json").read_text())
    for passed, word in ((True, "passed"), (False, "failed")):
        (tmp_path / "artifact" / "dispc.json").write_text(json.dumps(manifest | {"validation": {"passed": passed}}))
        assert inspect_path(tmp_path / "artifact").facts["validation"] == word


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20) | st.just("[/b] :smile:"))
@settings(max_examples=30)
def test_any_metadata_can_be_shown(text: str) -> None:
    config, path = harness.checkpoint("llama").config, harness.scratch() / "shown.safetensors"
    Masks.from_indices([{}] * 3, config, metadata={"data": text, text or "note": "x"}).save(path, config)
    table, report = command.run("inspect", path), command.run("inspect", path, "--json")
    assert (table.code, report.code) == (0, 0)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata().items() <= json.loads(report.out)["facts"].items()
    if text == "[/b] :smile:":
        assert text in table.out


def nothing(path: Path) -> None:
    pass


def empty_directory(path: Path) -> None:
    path.mkdir()


def text_file(path: Path) -> None:
    path.write_text("not a mask file")


def weights(path: Path) -> None:
    shutil.copy(harness.checkpoint("llama").directory / "model.safetensors", path)


@pytest.mark.parametrize("make", [nothing, empty_directory, text_file, weights])
def test_what_is_none_of_the_three_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "it")
    assert_refused(tmp_path, "inspect", tmp_path / "it", says=(str(tmp_path / "it"),))
    assert_refused(tmp_path, "inspect", tmp_path / "it", "--json", says=(str(tmp_path / "it"),))


@pytest.mark.parametrize("name", ["model.onnx", "masks.safetensors", "dispc.json"])
@pytest.mark.parametrize("content", [None, b"", b"\xff nonsense"])
def test_a_spoilt_artifact_is_refused_with_the_file(
    name: str, content: bytes | None, place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "artifact", tmp_path / "artifact")
    says = str(tmp_path / "artifact" / name)
    if content is not None:
        (tmp_path / "artifact" / name).write_bytes(content)
    else:
        (tmp_path / "artifact" / name).unlink()
        if name == "dispc.json":  # what is left looks like a model without weights
            says = "no model.safetensors"
    assert_refused(tmp_path, "inspect", tmp_path / "artifact", says=(says,))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_spoilt_model_is_refused_with_the_file(name: str, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(b"nonsense")
    assert_refused(tmp_path, "inspect", tmp_path / "model", says=(str(tmp_path / "model" / name),))
