"""The family table against the models it describes, and what it refuses."""

from pathlib import Path
from typing import Any

import harness
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dispc.model.config import DecoderConfig
from dispc.model.families import FAMILIES, find_family, supported_models
from dispc.support.errors import UnsupportedModelError

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"model_type": "gpt2"}, "'gpt2' is not supported"),
    "no model_type": ({}, "'missing' is not supported"),
    "moe": ({"model_type": "mixtral", "num_local_experts": 8}, "mixture-of-experts"),
    "remote code": (
        {"model_type": "new", "auto_map": {"AutoModel": "m.M"}},
        "never runs code from a checkpoint",
    ),
    "opt-350m norms": ({"model_type": "opt", "do_layer_norm_before": False}, "OPT-350M"),
    "opt-350m projections": ({"model_type": "opt", "hidden_size": 8, "word_embed_proj_dim": 4}, "OPT-350M"),
    "opt without final norm": ({"model_type": "opt", "_remove_final_layer_norm": True}, "layer norms"),
    "opt weightless norms": ({"model_type": "opt", "layer_norm_elementwise_affine": False}, "layer norms"),
    "dynamic rope": ({"model_type": "llama", "rope_scaling": {"type": "dynamic"}}, "dynamic or longrope"),
    "longrope": ({"model_type": "phi", "rope_parameters": {"rope_type": "longrope"}}, "dynamic or longrope"),
    "quantised": ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantised"),
}


@pytest.fixture(params=[*tiny.VARIANTS, *tiny.FURTHER])
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def projections(model: nn.Module, variant: str, index: int) -> list[nn.Module]:
    family = harness.checkpoint(variant).family
    block = model.get_submodule(family.block(index))
    names = (*family.attention_reads, family.attention_out, *family.mlp_reads, family.down)
    return [block.get_submodule(name) for name in names]


def test_a_row_names_every_linear_layer_of_a_block_once(variant: str) -> None:
    model, config = harness._dense_reference(variant), harness.checkpoint(variant).config
    for index in range(config.num_hidden_layers):
        block = model.get_submodule(config.family.block(index))
        linears = {module for module in block.modules() if isinstance(module, nn.Linear)}
        named = projections(model, variant, index)
        assert set(named) == linears
        assert len(named) == len(linears)


def test_a_row_names_every_norm_of_a_block_and_the_embedding(variant: str) -> None:
    model, config = harness._dense_reference(variant), harness.checkpoint(variant).config
    family, block = config.family, model.get_submodule(config.family.block(0))
    wide = {m for n, m in block.named_modules() if "norm" in n and tuple(m.weight.shape) == (config.hidden_size,)}
    names = {family.attention_norm, family.attention_post_norm, family.mlp_norm, family.mlp_post_norm} - {None}
    head_norms = {m for n, m in block.named_modules() if n.endswith(("q_norm", "k_norm"))}  # OLMo 2's are as wide
    assert {block.get_submodule(str(name)) for name in names} == wide - head_norms
    assert family.head_norms == bool(head_norms)
    assert all(family.norm.describes(module) for module in wide)
    assert model.get_submodule(family.embedding) is model.get_input_embeddings()


def test_sizes_and_block_parameters_are_those_of_the_model(variant: str) -> None:
    model, config = harness._dense_reference(variant), harness.checkpoint(variant).config
    weights = [module.weight for module in projections(model, variant, 0)]
    assert config.block_parameters == sum(weight.numel() for weight in weights)
    assert config.query_size == weights[0].shape[0]
    assert config.key_value_size == weights[1].shape[0] == weights[2].shape[0]
    assert config.intermediate_size == weights[-1].shape[1]
    assert (config.vocab_size, config.hidden_size) == tuple(model.get_input_embeddings().weight.shape)
    assert config.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert len(config.layer_kinds) == config.num_hidden_layers == len(model.get_submodule(config.family.layers))


def test_layer_kinds_tell_blocks_with_and_without_a_window_apart() -> None:
    kinds = harness.checkpoint("qwen2-mixed-window").config.layer_kinds
    assert len(set(kinds)) == 2
    assert len(set(harness.checkpoint("qwen2").config.layer_kinds)) == 1


def test_sizes_that_a_config_leaves_out_follow_from_the_others() -> None:
    class Bare:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 24, 10, 2, 3
        vocab_size, max_position_embeddings, tie_word_embeddings = 5, 7, False

    config = DecoderConfig.from_pretrained(Bare(), FAMILIES["llama"])
    assert (config.num_key_value_heads, config.head_dim) == (3, 8)
    assert config.layer_kinds == ("full_attention",) * 2


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_with_the_reason_and_the_list(case: str) -> None:
    config, reason = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        find_family(config)
    assert supported_models() in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("rope", [None, {"type": "linear"}, {"rope_type": "llama3"}, {"rope_type": "default"}])
def test_every_family_is_accepted_with_fixed_rotary_scaling(model_type: str, rope: Any) -> None:
    config = {"model_type": model_type, "hidden_size": 64, "rope_scaling": rope, "quantization_config": None}
    assert find_family(config) is FAMILIES[model_type]


def test_the_list_of_supported_models_names_every_row() -> None:
    assert all(f"{name} ({family.title})" in supported_models() for name, family in FAMILIES.items())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = (
    "rope_scaling",
    "rope_parameters",
    "quantization_config",
    "auto_map",
    "hidden_size",
    "num_experts",
    "word_embed_proj_dim",
    "do_layer_norm_before",
)


@given(st.sampled_from([*FAMILIES, "other"]) | JSON, st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_any_json_object_is_a_family_or_a_refusal(model_type: Any, config: dict[str, Any]) -> None:
    try:
        assert find_family({"model_type": model_type} | config).model_type == model_type
    except UnsupportedModelError as refusal:
        assert "supported: " in str(refusal)


def test_the_readme_names_every_family() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if line.startswith("| families |"))
    assert row == f"| families | {', '.join(f'`{f.model_type}` ({f.title})' for f in FAMILIES.values())} |"
