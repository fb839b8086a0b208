"""One reading of config.json: files of either release, the same model; what nobody knows is refused by name."""

import functools
import json
from pathlib import Path
from typing import Any

import harness
import pytest
import saved_configs
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_configs import stored

from dispc.export.trace import export_program
from dispc.model.families import FAMILIES
from dispc.model.pretrained import build_model
from dispc.model.rope import FULL, Rope, check_ropes
from dispc.support.errors import CheckpointError, DispcError

SAVED = saved_configs.load()
VARIANTS = tuple(saved_configs.EVERY)
FAMILY = {name: FAMILIES[model_type] for name, (model_type, _) in saved_configs.EVERY.items()}
ROTARY = tuple(name for name in VARIANTS if FAMILY[name].rotary)


def tables_of(variant: str, raw: dict[str, Any], directory: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cosines and sines that the compiler makes of `raw`, for each rotation of the model."""
    checkpoint = stored(raw, directory)
    (directory / "model.safetensors").symlink_to(harness.checkpoint(variant).directory / "model.safetensors")
    return [
        (t.cos, t.sin)
        for t in (rotation.tables(torch.float32) for rotation in export_program(checkpoint, torch.float32).rotations)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_saved_configs_are_what_the_installed_release_writes(variant: str) -> None:
    say = "run python tests/shared/saved_configs.py with both releases"
    assert SAVED.get(variant, {}).keys() == set(saved_configs.RELEASES), say
    assert saved_configs.write_as_installed(variant) == SAVED[variant][saved_configs.installed()], say


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_of_either_release_gives_the_same_model(variant: str, tmp_path: Path) -> None:
    found = [stored(SAVED[variant][release], tmp_path / release) for release in saved_configs.RELEASES]
    assert found[0].ropes == found[1].ropes
    assert found[0].config == found[1].config
    first, second = (one.pretrained_config.to_dict() | {"_name_or_path": ""} for one in found)
    assert first == second


@pytest.mark.parametrize("variant", ROTARY)
def test_a_config_of_either_release_gives_the_same_rotary_tables(variant: str, tmp_path: Path) -> None:
    first, second = (
        tables_of(variant, SAVED[variant][release], tmp_path / release) for release in saved_configs.RELEASES
    )
    assert len(first) == len(second) == len(stored(SAVED[variant]["4"], tmp_path / "4").ropes)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("release", saved_configs.RELEASES)
@pytest.mark.parametrize("variant", [name for name in ROTARY if FAMILY[name].local_rope_theta is None])
def test_the_base_of_rotary_positions_is_the_one_that_the_file_says(variant: str, release: str, tmp_path: Path) -> None:
    raw = json.loads(json.dumps(SAVED[variant][release]))
    (raw["rope_parameters"] if release == "5" else raw)["rope_theta"] = 500_000.0
    if "rotary_emb_base" in raw:
        raw["rotary_emb_base"] = 500_000.0
    if "rope_theta" in (raw.get("rope_scaling") or {}):
        raw["rope_scaling"]["rope_theta"] = 500_000.0
    checkpoint = stored(raw, tmp_path / "model")
    assert checkpoint.ropes[FULL].theta == 500_000.0
    frequencies, stretch = checkpoint.ropes[FULL].frequencies(checkpoint.config.head_dim)
    angles = torch.outer(torch.arange(checkpoint.config.max_positions).double(), torch.from_numpy(frequencies))
    ((cosines, _),) = tables_of(variant, raw, tmp_path / "model")
    assert torch.allclose(cosines.double(), angles.cos() * stretch, atol=1e-4)


SCALINGS = st.one_of(
    st.just({"rope_type": "default"}),
    st.builds(lambda f: {"rope_type": "linear", "factor": f}, st.floats(1, 64)),
    st.builds(
        lambda f, low, gap, n: {
            "rope_type": "llama3",
            "factor": f,
            "low_freq_factor": low,
            "high_freq_factor": low + gap,
            "original_max_position_embeddings": n,
        },
        st.floats(1, 64),
        st.floats(0.5, 4),
        st.floats(0.5, 8),
        st.integers(16, 150),
    ),
    st.builds(
        lambda f, n, fast, more: {
            "rope_type": "yarn",
            "factor": f,
            "original_max_position_embeddings": n,
            "beta_fast": fast,
            **more,
        },
        st.floats(1, 64),
        st.integers(16, 4096),
        st.floats(4, 64),
        st.sampled_from(({}, {"truncate": False}, {"attention_factor": 1.25}, {"mscale": 1.0, "mscale_all_dim": 0.5})),
    ),
)


@settings(deadline=None, max_examples=60)
@given(theta=st.floats(100, 10_000_000), scaling=SCALINGS, width=st.sampled_from((8, 16, 64, 128)))
def test_our_frequencies_are_those_of_transformers(theta: float, scaling: dict[str, Any], width: int) -> None:
    raw = tiny.LLAMA | dict(model_type="llama", head_dim=width, rope_parameters={"rope_theta": theta, **scaling})
    with_rope = stored(raw, harness.scratch() / "rope")
    with torch.device("meta"):
        model = build_model(with_rope.pretrained_config, torch.float32, "sdpa")
    rotary = next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    with_rope.check_rotary(type(rotary)(with_rope.pretrained_config))


@pytest.mark.parametrize(
    "change", [{"theta": 10_010.0}, {"share": 0.5}, {"scaling": {"rope_type": "linear", "factor": 2}}]
)
def test_rotary_positions_that_are_not_those_of_the_file_are_found(change: dict[str, Any]) -> None:
    checkpoint = harness.checkpoint("llama")
    model = checkpoint.load_model(torch.float32)
    right: dict[str, Any] = dict(theta=10_000.0, share=1.0, scaling={"rope_type": "default"})
    check_ropes(model, {FULL: Rope(**right)}, 16)
    with pytest.raises(CheckpointError, match="not those"):
        check_ropes(model, {FULL: Rope(**(right | change))}, 16)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    "not causal": ({"is_causal": False}, "is_causal"),
    "without rotation": ({"use_rope": False}, "use_rope"),
    "unscaled": ({"scale_attn_weights": False}, "scale_attn_weights"),
    "other norms": ({"use_rms_norm": False}, "use_rms_norm"),
    "nothing left": ({"residual_multiplier": 0}, "residual_multiplier"),
    "no residual": ({"use_residual": False}, "use_residual"),
    "one norm for all": ({"norm_type": 0}, "norm_type"),
    "no way around": ({"skip_connection": False}, "skip_connection"),
    "no gate": ({"gated_mlp": False}, "gated_mlp"),
    "no softmax": ({"softmax": 0}, "softmax"),
    "a window switched off": ({"use_sliding_window": False, "sliding_window": 7}, "use_sliding_window"),
    "two bases": ({"rope_theta": 10_000.0, "rope_parameters": {"rope_theta": 500_000.0}}, "500000"),
    "two scalings": (
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 4.0},
        },
        "contradict",
    ),
    "rotary words": ({"rope_theta": "large"}, "rope_theta"),
    "rotary list": ({"rope_parameters": [1]}, "rotary"),
    "nested rotary": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    "unknown rotary key": ({"rope_scaling": {"type": "linear", "factor": 2.0, "long_mscale": 2.0}}, "long_mscale"),
    "scaling without factor": ({"rope_scaling": {"type": "linear"}}, "factor"),
    "part of heads": ({"partial_rotary_factor": 0.5}, "whole heads"),
    "billion blocks": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "billion positions": ({"max_position_embeddings": 10**9}, "max_position_embeddings"),
    "billion words": ({"vocab_size": 10**9}, "vocab_size"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(what: str, tmp_path: Path) -> None:
    change, named = REFUSED[what]
    raw = {"model_type": "llama", **tiny.LLAMA, **change}
    with pytest.raises(DispcError, match=named) as refusal:
        _ = stored(raw, tmp_path / "model").config
    assert "config.json" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "harmless",
    [
        {"torch_dtype": "float64"},
        {"use_cache": False},
        {"unsloth_fixed": True},
        {"use_qk_norm": False, "n_routed_experts": 0, "is_bidirectional": False, "no_bias": False, "use_mrope": False},
        {
            "use_sliding_window": False,
            "sliding_window": None,
            "rope_interleaved": False,
            "attention_softmax_in_fp32": 0,
        },
        {"qkv_bias": False, "add_cross_attention": False, "chunk_size_feed_forward": 0, "router_aux_loss_coef": 0.0},
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": "flash_attention_2"},
        {"pad_token_id": 10**6},
        {"is_llama_config": True, "rope_interleaved": False, "mystery": None},
        {"bos_token_id": "x"},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
    ],
)
def test_what_changes_nothing_is_left_aside(harmless: dict[str, Any], tmp_path: Path) -> None:
    plain = {"model_type": "llama", **tiny.LLAMA}
    first, second = (stored(raw, tmp_path / name) for name, raw in (("plain", plain), ("more", plain | harmless)))
    assert first.ropes == second.ropes and first.config == second.config
    with torch.device("meta"):
        assert build_model(second.pretrained_config, torch.float32, "sdpa").config._attn_implementation == "sdpa"


def test_a_release_that_changes_a_value_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    original = LlamaConfig.__init__

    @functools.wraps(original)
    def stubborn(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.rms_norm_eps = 1e-3

    monkeypatch.setattr(LlamaConfig, "__init__", stubborn)
    raw = {"model_type": "llama", **tiny.LLAMA, "rms_norm_eps": 1e-6}
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        _ = stored(raw, tmp_path / "model").config


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_loading_gives_the_model_of_transformers(variant: str) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = harness.checkpoint(variant)
    theirs = AutoModelForCausalLM.from_pretrained(
        str(checkpoint.directory),
        dtype=torch.float32,
        attn_implementation="eager",  # others leave a softcap out
    ).eval()
    ours = checkpoint.load_model(torch.float32)
    assert not any(value.is_meta for value in (*ours.parameters(), *ours.buffers()))
    expected = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in ours.named_parameters())
    ids = torch.from_numpy(harness.TOKENS)[None]
    with torch.no_grad():
        expected_logits, logits = theirs(input_ids=ids).logits, ours(input_ids=ids).logits
    # equal but for the order of sums, which BLAS libraries choose by CPU and by how the tensors lie in memory
    assert float((logits - expected_logits).abs().max()) <= 1e-4 * float(expected_logits.abs().max())
