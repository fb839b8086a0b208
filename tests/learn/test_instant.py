"""What the scores of the instant methods select: positions that do nothing go first."""

from pathlib import Path
from typing import Any

import harness
import language
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from dispc.learn.budget import final_sets, position_costs
from dispc.learn.instant import METHODS, instant_masks
from dispc.masks import SETS, Masks
from dispc.support.errors import DataError, LearnError, MasksError

DEAD = [3, 17, 30, 41]
"""Positions in which something is planted; the sets of the other kinds stay as they are."""
LAYERS = {
    "attention.read": [("self_attn.q_proj", 1), ("self_attn.k_proj", 1), ("self_attn.v_proj", 1)],
    "attention.write": [("self_attn.o_proj", 0)],
    "mlp.read": [("mlp.gate_proj", 1), ("mlp.up_proj", 1)],
    "mlp.mid": [("mlp.down_proj", 1)],
    "mlp.write": [("mlp.down_proj", 0)],
}
"""For every set the layers whose weights it selects from, and the axis of the weight [out, in] that it selects on."""


pytestmark = pytest.mark.usefixtures("own_cache")


def planted(folder: Path, name: str, plant: Any) -> Path:
    """A tiny llama in whose weights `plant(state, block)` has changed something, with tokenizer and text."""
    model = tiny.make_model("llama", folder / name)
    language.make_tokenizer(model)
    state = load_file(model / "model.safetensors")
    for block in range(harness.checkpoint("llama").config.num_hidden_layers):
        plant(state, f"model.layers.{block}")
    save_file(state, model / "model.safetensors", {"format": "pt"})
    (folder / "text.txt").write_text(language.make_text(200, 4))
    return model


def dropped(masks: Masks, name: str) -> list[set[int]]:
    width = masks.intermediate_size if name == "mlp.mid" else masks.hidden_size
    return [set(range(width)) - set(block.sets()[name].tolist()) for block in masks.blocks]


@pytest.mark.parametrize("name", SETS)
def test_magnitude_drops_positions_without_weights_first(tmp_path: Path, name: str) -> None:
    def plant(state: dict[str, torch.Tensor], block: str) -> None:
        for layer, axis in LAYERS[name]:
            state[f"{block}.{layer}.weight"].index_fill_(axis, torch.tensor(DEAD), 0.0)

    model = planted(tmp_path, "model", plant)
    masks = instant_masks(model, "magnitude", 0.1)
    assert all(set(DEAD) <= found for found in dropped(masks, name))


def test_one_layer_of_a_read_set_is_enough_to_keep_a_position(tmp_path: Path) -> None:
    """Dead for query and key, but the value reads it: the norm is over all three."""

    def plant(state: dict[str, torch.Tensor], block: str) -> None:
        for layer in ("self_attn.q_proj", "self_attn.k_proj"):
            state[f"{block}.{layer}.weight"].index_fill_(1, torch.tensor(DEAD), 0.0)
        state[f"{block}.self_attn.v_proj.weight"][:, DEAD] *= 50

    model = planted(tmp_path, "model", plant)
    for found in dropped(instant_masks(model, "magnitude", 0.5), "attention.read"):
        assert found and not found & set(DEAD)


def test_activation_drops_positions_that_carry_nothing_first(tmp_path: Path) -> None:
    """The weights that read them are the largest of all, so that magnitude would keep every one."""

    def plant(state: dict[str, torch.Tensor], block: str) -> None:
        state[f"{block}.input_layernorm.weight"][DEAD] = 0.0
        for layer in ("q_proj", "k_proj", "v_proj"):
            state[f"{block}.self_attn.{layer}.weight"][:, DEAD] *= 50
        state[f"{block}.mlp.up_proj.weight"][DEAD] = 0.0
        state[f"{block}.mlp.down_proj.weight"][:, DEAD] *= 50

    model, text = planted(tmp_path, "model", plant), str(tmp_path / "text.txt")
    masks = instant_masks(model, "activation", 0.1, data=text, sequence_length=32)
    by_weight = instant_masks(model, "magnitude", 0.1)
    for name in ("attention.read", "mlp.mid"):
        assert all(set(DEAD) <= found for found in dropped(masks, name))
        assert not any(set(DEAD) & found for found in dropped(by_weight, name))


def test_activation_judges_a_write_set_by_what_is_written(tmp_path: Path) -> None:
    def plant(state: dict[str, torch.Tensor], block: str) -> None:
        state[f"{block}.mlp.up_proj.weight"][:40] = 0.0  # what the middle carries there is nothing ...
        state[f"{block}.mlp.down_proj.weight"][DEAD, 40:] = 0.0  # ... and these read nothing else,
        state[f"{block}.mlp.down_proj.weight"][DEAD, :40] *= 50  # with large weights

    model, text = planted(tmp_path, "model", plant), str(tmp_path / "text.txt")
    masks = instant_masks(model, "activation", 0.5, data=text, sequence_length=32)
    assert all(set(DEAD) <= found for found in dropped(masks, "mlp.write"))
    by_weight = instant_masks(model, "magnitude", 0.5)
    assert not any(set(DEAD) & found for found in dropped(by_weight, "mlp.write"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["magnitude", "activation"])
def test_a_weight_that_is_not_a_number_is_refused(
    tmp_path: Path, method: Any, value: float, recwarn: pytest.WarningsRecorder
) -> None:
    def plant(state: dict[str, torch.Tensor], block: str) -> None:
        if block.endswith("1"):
            state[f"{block}.mlp.down_proj.weight"][3, 5] = value

    model = planted(tmp_path, "model", plant)
    with pytest.raises(MasksError, match=r"block \d, .*: a score is not a number"):
        instant_masks(model, method, 0.3, data=str(tmp_path / "text.txt"), sequence_length=32)
    assert not [warning for warning in recwarn if "invalid value" in str(warning.message)]


def test_random_is_that_of_its_seed() -> None:
    model = harness.checkpoint("llama").directory
    first, same, other = (instant_masks(model, "random", 0.4, seed=seed) for seed in (1, 1, 2))
    assert first.sha256() == same.sha256() != other.sha256()


def test_a_position_scores_by_its_share_of_its_own_set(tmp_path: Path) -> None:
    """A set whose weights are all larger keeps no more of its positions for that."""

    def plant(state: dict[str, torch.Tensor], block: str) -> None:
        if block.endswith("1"):
            for layer in ("gate_proj", "up_proj", "down_proj"):
                state[f"{block}.mlp.{layer}.weight"] *= 100

    one, other = (instant_masks(planted(tmp_path, n, p), "magnitude", 0.4) for n, p in (("a", plant), ("b", idle)))
    assert one.sha256() == other.sha256()


def idle(state: dict[str, torch.Tensor], block: str) -> None:
    """Nothing is planted."""


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        (dict(ratio_of="block"), "ratio_of is 'block'"),
        (dict(norm_scope="foo"), "norm_scope is 'foo'"),
        (dict(align=0), "align is 0"),
        (dict(sequence_length=1), "sequence_length is 1"),
        (dict(seed=-1), "seed is -1"),
    ],
    ids=str,
)
def test_choices_that_are_none_are_refused(choices: dict[str, Any], says: str) -> None:
    for method in ("random", "magnitude", "activation"):
        with pytest.raises(LearnError, match=says):
            instant_masks(harness.checkpoint("llama").directory, method, 0.5, **choices)  # type: ignore[arg-type]


def test_activation_without_a_text_is_refused() -> None:
    with pytest.raises(DataError, match="give --data"):
        instant_masks(harness.checkpoint("llama").directory, "activation", 0.5)


def test_a_norm_scope_that_is_none_reaches_no_file() -> None:
    config = harness.checkpoint("llama").config
    latents = np.zeros(len(SETS) * config.num_hidden_layers * config.intermediate_size, dtype=np.float32)
    with pytest.raises(Exception, match="norm_scope 'foo'"):
        final_sets(latents, config, 10**9, norm_scope="foo")  # type: ignore[arg-type]


def test_middle_prunes_the_middle_alone_and_as_much_in_each_block(tmp_path: Path) -> None:
    model = planted(tmp_path, "model", idle)
    masks = instant_masks(model, "middle", 0.3, data=str(tmp_path / "text.txt"), sequence_length=32)
    counts = [len(found) for found in dropped(masks, "mlp.mid")]
    assert max(counts) - min(counts) <= 1 < min(counts)
    for name in set(SETS) - {"mlp.mid"}:
        assert not any(dropped(masks, name))


def test_gradient_drops_what_the_loss_does_not_miss_and_counts_what_a_position_costs(tmp_path: Path) -> None:
    def plant(state: dict[str, torch.Tensor], block: str) -> None:
        state[f"{block}.mlp.down_proj.weight"][:, DEAD] = 0.0  # nothing of the middle arrives from there

    model = planted(tmp_path, "model", plant)
    masks = instant_masks(model, "gradient", 0.1, data=str(tmp_path / "text.txt"), sequence_length=32)
    assert all(set(DEAD) <= found for found in dropped(masks, "mlp.mid"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_its_budget(tmp_path: Path, method: str) -> None:
    model = planted(tmp_path, "model", idle)
    config = harness.checkpoint("llama").config
    dense = config.block_parameters * config.num_hidden_layers
    masks = instant_masks(model, method, 0.5, data=str(tmp_path / "text.txt"), sequence_length=32)
    assert 0.48 * dense < masks.kept_parameters(config) <= 0.5 * dense
    assert masks.metadata["method"] == method


def test_the_cost_of_a_position_is_what_it_takes_away() -> None:
    config = harness.checkpoint("llama").config
    whole = Masks.dense(config).kept_parameters(config)
    for name, cost in zip(SETS, position_costs(config), strict=True):
        width = config.intermediate_size if name == "mlp.mid" else config.hidden_size
        blocks: list[dict[str, Any]] = [{} for _ in range(config.num_hidden_layers)]
        blocks[0] = {name: np.arange(1, width)}
        assert whole - Masks.from_indices(blocks, config).kept_parameters(config) == cost
