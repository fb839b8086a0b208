"""Every option of every configuration class: a model is what transformers makes of it, or is refused by that name.

Each key that the installed release knows of a family gets another value than the tiny model has. Of what transformers
makes of it our graph computes the same; where transformers itself makes nothing of it, reading ends with its name.
"""

import json
from pathlib import Path
from typing import Any

import harness
import pytest
import tiny
import torch
from saved_configs import installed
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.families import FAMILIES, find_family
from dispc.model.pretrained import HARMLESS
from dispc.model.rope import ROPE_KEYS
from dispc.support.errors import DispcError, UnsupportedModelError
from dispc.validate.checks.parity import logit_error

BASES = dict(reversed((tiny.VARIANTS | tiny.FURTHER).values()))
"""Options of a tiny model of each family."""
VALUES: dict[str, Any] = {
    "hidden_act": "relu",
    "hidden_activation": "gelu",
    "activation_function": "gelu_new",
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "head_dim": 24,
    "hidden_size": 96,
    "intermediate_size": 40,
    "ffn_dim": 40,
    "word_embed_proj_dim": 32,
    "vocab_size": 160,
    "max_position_embeddings": 80,
    "original_max_position_embeddings": 40,
    "query_pre_attn_scalar": 9,
    "sliding_window": 3,
    "layer_types": ["full_attention", "sliding_attention"],
    "_sliding_window_pattern": 2,
    "no_rope_layers": [0, 1],
    "no_rope_layer_interval": 2,
    "max_window_layers": 1,
    "cross_attention_hidden_size": 8,
    "chunk_size_feed_forward": 2,
    "pruned_heads": {"0": [1]},
    "rms_norm_eps": 0.1,
    "layer_norm_eps": 0.1,
    "norm_eps": 0.1,
    "norm_epsilon": 0.1,
}
"""What options get that are neither switches nor factors: something that has an effect."""
SIZES = (
    "hidden_size",
    "intermediate_size",
    "ffn_dim",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "original_max_position_embeddings",
)
"""Options whose models are read and not traced: other tests have graphs of many sizes."""
TRACED = installed() == "4"
"""With release 5 models are read only: tracing takes nearly all the time, and other tests trace every family there."""
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
COMPANIONS: dict[str, dict[str, Any]] = {
    "max_window_layers": WINDOWS,
    "use_sliding_window": WINDOWS,
    "sliding_window": WINDOWS,
    "layer_types": WINDOWS,
    "no_rope_layer_interval": {"no_rope_layers": None},
    "_sliding_window_pattern": {"layer_types": None},
    "num_hidden_layers": {"layer_types": None, "no_rope_layers": None},
    "hidden_size": {"head_dim": None, "word_embed_proj_dim": 96},
    "num_attention_heads": {"head_dim": None, "num_key_value_heads": 2},
}
"""Options without which another has no effect, or which it contradicts; None takes one away."""


def options_of(model_type: str) -> list[str]:
    """Every key of the configuration class that may decide what is computed, rotary positions excepted."""
    rotary = ROPE_KEYS if FAMILIES[model_type].rotary else ()
    keys = {*CONFIG_MAPPING[model_type]().to_dict(), "head_dim"}
    return sorted(key for key in keys if not HARMLESS.fullmatch(key) and key not in rotary)


def with_option(model_type: str, key: str) -> dict[str, Any]:
    """Two tiny blocks, with another value of an option."""
    known = CONFIG_MAPPING[model_type]().to_dict()
    options = BASES[model_type] | {"num_hidden_layers": 2}
    options |= {name: options[name][:2] for name in ("layer_types", "no_rope_layers") if name in options}
    options |= {name: value for name, value in COMPANIONS.get(key, {}).items() if name in known or value is None}
    options = {name: value for name, value in options.items() if value is not None}
    value = getattr(AutoConfig.for_model(model_type, **options), key, None)
    if key in VALUES:
        return options | {key: VALUES[key]}
    return options | {key: not value if isinstance(value, bool | None) else 0.7 * value}


def make(model_type: str, options: dict[str, Any], directory: Path) -> Any:
    """The model that transformers makes of these options, saved; None when it makes none, or one without the option."""
    torch.manual_seed(0)
    try:
        config = AutoConfig.for_model(model_type, **json.loads(json.dumps(options)))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        tiny.fill(model)
    except Exception:  # what transformers raises for an option that it does not do either shares no base class
        return None
    model.save_pretrained(directory)
    return model


def logits(checkpoint: Checkpoint, *, traced: bool) -> harness.Array:
    """Logits [S,V] of the graph that is compiled, or of the model that is read."""
    if traced:
        return harness.model_logits(harness.graph_of(checkpoint, Masks.dense(checkpoint.config)))
    return harness.rows_of(checkpoint.load_model(torch.float32), [harness.TOKENS])[0]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_option_is_done_as_transformers_does_it_or_refused_by_name(model_type: str, tmp_path: Path) -> None:
    done = []
    for number, key in enumerate(options_of(model_type)):
        options, directory = with_option(model_type, key), tmp_path / str(number)
        model = make(model_type, options, directory)
        if model is None or json.loads((directory / "config.json").read_text()).get(key) != options[key]:
            directory.mkdir(exist_ok=True)
            (directory / "config.json").write_text(json.dumps({"model_type": model_type} | options))
        try:
            found = logits(Checkpoint(directory), traced=TRACED and key not in SIZES)
        except DispcError as refusal:
            assert key.strip("_") in str(refusal).replace(str(tmp_path), ""), (key, str(refusal))
            continue
        assert model is not None, key
        (expected,) = harness.rows_of(model, [harness.TOKENS])
        assert logit_error(found, expected) <= harness.TOLERANCE, (key, options[key])
        done.append(key)
    assert {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"} <= {*done}


PUBLISHED: list[dict[str, Any]] = [
    {"model_type": "smollm3", "max_window_layers": 28, "use_sliding_window": False, "no_rope_layer_interval": 4},
    {"model_type": "nemotron", "kv_channels": 16, "num_attention_heads": 4, "hidden_size": 64},
    {"model_type": "gemma3_text", "sliding_window_pattern": 6, "layer_types": None},
    {"model_type": "starcoder2", "norm_type": "layer_norm", "mlp_type": "default", "scale_attn_weights": True},
]
"""What published files say beyond what the configuration classes know."""


@pytest.mark.parametrize("said", PUBLISHED, ids=lambda said: str(said["model_type"]))
def test_what_published_files_say_besides_is_read(said: dict[str, Any], tmp_path: Path) -> None:
    model_type = said["model_type"]
    options = {k: v for k, v in BASES[model_type].items() if k not in ("layer_types", "no_rope_layers", "head_dim")}
    assert make(model_type, options | {k: v for k, v in said.items() if k in ("hidden_size",)}, tmp_path) is not None
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text()) | {k: v for k, v in said.items() if v is not None}
    file.write_text(json.dumps({k: v for k, v in raw.items() if said.get(k, 0) is not None}))
    assert Checkpoint(tmp_path).config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"model_type": "nemotron", "kv_channels": 32, "num_attention_heads": 4, "hidden_size": 64}, "kv_channels"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 4}, "sliding_window_pattern"),
        ({"model_type": "stablelm", "head_dim": 32, "num_attention_heads": 4, "hidden_size": 64}, "head_dim"),
        ({"model_type": "gemma", "hidden_activation": "gelu"}, "hidden_activation"),
        ({"model_type": "gpt_neox", "head_dim": 32, "num_attention_heads": 4, "hidden_size": 64}, "head_dim"),
    ],
)
def test_and_refused_where_it_says_something_else(said: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        find_family(said)
