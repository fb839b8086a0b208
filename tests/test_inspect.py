"""`dispc inspect` tells the same facts that masks, artifact and checkpoint hold."""

from pathlib import Path

import harness
import onnx
import pytest

from dispc.compiler import CompileOptions, compile_model
from dispc.errors import DispcError
from dispc.inspect import inspect_path
from dispc.masks import SETS, Masks


def test_masks_show_the_width_of_every_set(tmp_path: Path) -> None:
    config = harness.checkpoint("llama").config
    masks = Masks.random(config, 0.5, 8)
    masks.save(tmp_path / "masks.safetensors", config)
    facts = inspect_path(tmp_path / "masks.safetensors")
    assert facts["kind"] == "masks"
    assert facts["widths"] == [{name: len(block.sets()[name]) for name in SETS} for block in masks.blocks]
    assert facts["facts"]["sha256"] == masks.sha256()


def test_an_artifact_shows_its_operators_and_widths(tmp_path: Path) -> None:
    checkpoint = harness.checkpoint("llama")
    masks = Masks.random(checkpoint.config, 0.5, 8)
    masks.save(tmp_path / "masks.safetensors", checkpoint.config)
    options = CompileOptions(
        model=checkpoint.directory,
        output=tmp_path / "out",
        target="onnx-cpu",
        masks=tmp_path / "masks.safetensors",
        validate=False,
    )
    compile_model(options)
    facts = inspect_path(tmp_path / "out")
    nodes = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    assert sum(facts["operators"].values()) == len(nodes)
    assert facts["operators"]["com.microsoft.GroupQueryAttention"] == 3
    assert facts["facts"]["validation"] == "not run"
    assert facts["manifest"]["block_parameters"]["kept"] == masks.kept_parameters(checkpoint.config)


def test_a_model_shows_its_parameters() -> None:
    facts = inspect_path(harness.checkpoint("llama").directory)["facts"]
    assert facts["blocks"] == 3
    assert facts["block parameters"] == f"{3 * harness.checkpoint('llama').config.block_parameters:,}"


def test_anything_else_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DispcError, match="no mask file, artifact or model directory"):
        inspect_path(tmp_path)
