"""Shared by the tests of the benchmarks: artifacts, masks, configs, and runs with --smoke."""

import json
from pathlib import Path
from typing import Any

import harness
import numpy as np
from common import compile_artifact
from shapes import SHAPES

from dispc.masks import Masks
from dispc.model.config import DecoderConfig
from dispc.model.families import FAMILIES


def decoder_config(shape: str) -> DecoderConfig:
    sizes = SHAPES[shape]
    return DecoderConfig(
        family=FAMILIES["llama"],
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.hidden // sizes.heads,
        vocab_size=sizes.vocabulary,
        max_positions=sizes.positions,
        tied=sizes.tied,
        layer_kinds=("full_attention",) * sizes.layers,
    )


def compiled(variant: str, masks: Masks | None, directory: Path) -> Path:
    """model.onnx of a tiny artifact for the CPU."""
    path = None
    if masks is not None:
        path = directory / "masks.safetensors"
        masks.save(path, harness.checkpoint(variant).config)
    compile_artifact(harness.checkpoint(variant).directory, directory / "artifact", "onnx-cpu", path)
    return directory / "artifact" / "model.onnx"


def some_masks(variant: str, norm_scope: Any = "full") -> Masks:
    """Random masks in which a block has no attention, another no MLP, and one set is full."""
    config = harness.checkpoint(variant).config
    rows = [block.sets() for block in Masks.random(config, 0.5, 3, norm_scope=norm_scope).blocks]
    rows[1]["attention.write"] = rows[2]["mlp.mid"] = np.array([], dtype=np.int64)
    rows[0]["mlp.read"] = np.arange(config.hidden_size)
    return Masks.from_indices(rows, config, norm_scope=norm_scope)


def smoke(script: Any, directory: Path, **options: Any) -> dict[str, Any]:
    """The result of a script with --smoke, whose `main` takes its options as such or as `Options`."""
    options |= {"smoke": True, "json_file": directory / "result.json", "work": directory / "work"}
    if hasattr(script, "Options"):
        script.main(script.Options(**options))
    else:
        script.main(**options)
    found: dict[str, Any] = json.loads((directory / "result.json").read_text())
    assert found["smoke"] and found["environment"]["packages"] and not (directory / "work").exists()
    return found
