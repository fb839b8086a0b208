"""Configs and weights that contradict themselves: refused by name, not compiled in one of their senses."""

import json
import shutil
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from safetensors.torch import load_file, save_file

from dispc.model.checkpoint import Checkpoint
from dispc.support.errors import CheckpointError

SLIDING = {"layer_types": ["sliding_attention"] * 3, "sliding_window": 7, "use_sliding_window": False}

ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq")


def changed(variant: str, place: Path, *, without: tuple[str, ...] = (), **values: Any) -> Path:
    model = Path(shutil.copytree(harness.checkpoint(variant).directory, place / variant))
    content = {k: v for k, v in json.loads((model / "config.json").read_text()).items() if k not in without}
    rotary = content.get("rope_parameters", {})  # where transformers 5 writes the share of a head that rotates
    rotary.update({key: value for key, value in values.items() if key in rotary})
    (model / "config.json").write_text(json.dumps(content | values))
    return model


def add(model: Path, **tensors: torch.Tensor) -> None:
    file = model / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})


def build(model: Path) -> None:
    Checkpoint(model).empty_model(torch.float32)


@pytest.mark.parametrize(
    ("variant", "without", "values", "says"),
    [
        ("gemma2", ("layer_types",), {"sliding_window": None}, "sliding_window is null"),
        ("smollm3", (), SLIDING, "use_sliding_window is false"),
        ("phi", (), {"partial_rotary_factor": 0.1875}, "3 dimensions of each head of 16 rotate"),
        (
            "llama",
            (*ROPE,),
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_scaling": {"rope_type": "default"}},
            "rope_theta stands in one of rope_parameters and rope_scaling",
        ),
        (
            "gemma3",
            (*ROPE,),
            {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}},
            "has no full_attention",
        ),
        ("gemma", (), {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("gpt-neox", (), {"rotary_pct": 0.01, "partial_rotary_factor": 0.01}, "0 dimensions of each head"),
    ],
)
def test_a_config_is_refused(
    variant: str, without: tuple[str, ...], values: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=says):
        build(changed(variant, tmp_path, without=without, **values))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_a_tied_head_in_any_dtype_must_be_the_embedding(dtype: torch.dtype, tmp_path: Path) -> None:
    model = changed("llama-tied-biased", tmp_path)
    add(model, **{"lm_head.weight": torch.ones(131, 48).to(dtype)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not the embedding"):
        build(model)


def test_a_tied_head_under_the_name_of_other_families_must_be_the_embedding(tmp_path: Path) -> None:
    model = changed("gpt-neox", tmp_path, tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["gpt_neox.embed_in.weight"]
    add(model, **{"embed_out.weight": embedding.clone(), "lm_head.weight": torch.randn(embedding.shape)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not the embedding"):
        build(model)
