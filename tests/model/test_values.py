"""Values of config.json: those of another kind or out of range are refused by name; what Gemma's activation means."""

from pathlib import Path
from typing import Any

import pytest
import saved_configs
import torch
from saved_configs import stored

from dispc.model.families import FAMILIES
from dispc.model.pretrained import HARMLESS, _parameters, build_model
from dispc.model.rope import ROPE_KEYS
from dispc.model.values import kind_of, sensible
from dispc.support.errors import CheckpointError, DispcError

SAVED = saved_configs.load()


UNKNOWN_KINDS: tuple[Any, ...] = (["chunked_attention"] * 3, [["x"]] * 3, "abc", {"full_attention": 3})
ALL_FULL, ALL_SLIDING = ["full_attention"] * 3, ["sliding_attention"] * 3
UNTRUE: list[tuple[str, dict[str, Any]]] = [
    *((name, {"layer_types": kinds}) for name in ("llama", "phi", "opt") for kinds in (["mamba"] * 3, ALL_SLIDING)),
    ("llama", {"layer_types": ALL_FULL[:2]}),
    ("llama", {"layer_types": "full_attention"}),
    ("mistral-window", {"sliding_window": 7, "layer_types": [*ALL_SLIDING[:2], "full_attention"]}),
    ("mistral-window", {"sliding_window": None, "layer_types": ALL_SLIDING}),
    ("qwen2", {"use_sliding_window": False, "layer_types": ALL_SLIDING}),
    *((name, {"layer_types": kinds}) for name in ("qwen2", "gemma2", "gemma3") for kinds in UNKNOWN_KINDS),
]
"""Kinds of blocks that a family has not, or that its window contradicts."""


@pytest.mark.parametrize(("variant", "said"), UNTRUE, ids=str)
def test_kinds_of_blocks_that_the_model_has_not_are_refused(variant: str, said: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="layer_types"):
        _ = stored(SAVED[variant]["4"] | said, tmp_path / "model").pretrained_config


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("llama", {"layer_types": ALL_FULL}),
        ("mistral-window", {"sliding_window": 7, "layer_types": ALL_SLIDING}),
        ("qwen2", {"layer_types": ALL_FULL}),
    ],
    ids=str,
)
def test_kinds_of_blocks_that_the_model_has_are_accepted(variant: str, said: dict[str, Any], tmp_path: Path) -> None:
    raw = SAVED[variant]["4"] | said
    assert raw["num_hidden_layers"] == 3
    without = stored({k: v for k, v in raw.items() if k != "layer_types"}, tmp_path / "without")
    assert stored(raw, tmp_path / "model").config == without.config


NONSENSE: list[tuple[str, str, list[Any]]] = [
    ("llama", "rms_norm_eps", ["1e-5", True, -1, float("inf"), float("nan"), None]),
    ("llama", "hidden_size", ["64", 64.0, 0, True, None]),
    ("llama", "hidden_act", [1, ["silu"]]),
    ("granite", "attention_multiplier", [float("inf"), "x", 0]),
    ("gemma2", "attn_logit_softcapping", ["x", 0, -1]),
    ("gemma2", "query_pre_attn_scalar", [-1, 0]),
    ("mistral-window", "sliding_window", [-1, 0, [7, None, 7], "7", 7.5]),
    ("qwen2", "use_sliding_window", ["true", 1]),
    ("smollm3", "no_rope_layers", ["abc", [1, 2, 1]]),
    ("qwen2", "layer_types", [[["x"], ["x"], ["x"]]]),
    ("llama", "rope_scaling", [{"rope_type": "linear", "type": "dynamic", "factor": 2.0}]),
    ("gemma3", "attn_logit_softcapping", [0.5, 0]),
]


@pytest.mark.parametrize(("variant", "key", "value"), [(v, k, value) for v, k, values in NONSENSE for value in values])
def test_a_value_of_another_kind_or_out_of_range_is_refused(variant: str, key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(DispcError, match=key if key != "rope_scaling" else "rope_type") as refusal:
        _ = stored(SAVED[variant]["4"] | {key: value}, tmp_path / "model").pretrained_config
    assert "config.json" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_that_decides_has_a_kind_and_the_families_own_values_are_of_it(model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    for key in _parameters(config_class):
        if not HARMLESS.fullmatch(key) and key not in ROPE_KEYS:
            assert kind_of(key) is not None, key
            sensible(key, getattr(config_class(), key, None))


TANH = "gelu_pytorch_tanh"
GEMMA: list[tuple[dict[str, Any], str]] = [
    ({}, TANH),
    ({"hidden_act": "gelu"}, TANH),
    ({"hidden_act": None, "hidden_activation": None}, TANH),
    ({"hidden_act": "gelu", "hidden_activation": TANH}, TANH),
    ({"hidden_act": "relu", "hidden_activation": "relu"}, "relu"),
    ({"hidden_act": "gelu", "hidden_activation": None}, TANH),
    ({"hidden_act": "silu"}, "silu"),
]
"""What config.json says of Gemma's activation, and what it means (the comment on "gelu" in transformers 5)."""


@pytest.mark.parametrize(("said", "meant"), GEMMA)
def test_gemmas_activation_is_what_its_files_mean(said: dict[str, Any], meant: str, tmp_path: Path) -> None:
    from transformers.activations import ACT2FN

    raw = {k: v for k, v in SAVED["gemma"]["4"].items() if not k.startswith("hidden_act")}
    with torch.device("meta"):
        model = build_model(stored(raw | said, tmp_path / "model").pretrained_config, torch.float32, "sdpa")
    values = torch.linspace(-4, 4, 99)
    assert torch.equal(model.model.layers[0].mlp.act_fn(values), ACT2FN[meant](values))
