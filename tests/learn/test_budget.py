"""The budget: what is counted, and final sets that meet it."""

import harness
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sets import gates_of

from dispc.learn.budget import block_budget, budget_facts, final_sets, kept_parameters, model_parameters, regulariser
from dispc.learn.hypernetwork import Layout
from dispc.masks import SETS, Masks, set_widths
from dispc.support.errors import MasksError

VARIANTS = ("llama", "phi", "opt", "llama-tied-biased")
CONFIG = harness.checkpoint("llama").config
DENSE = CONFIG.block_parameters * CONFIG.num_hidden_layers


@given(st.floats(0.05, 0.9), st.integers(0, 99))
def test_the_differentiable_count_is_the_count_of_the_masks(ratio: float, seed: int) -> None:
    masks = Masks.random(CONFIG, ratio, seed)
    assert int(kept_parameters(gates_of(masks), CONFIG)) == masks.kept_parameters(CONFIG)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_models_parameters_are_those_that_torch_counts(variant: str) -> None:
    reference = harness._dense_reference(variant)
    assert model_parameters(harness.checkpoint(variant)) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_ratio_of_the_model_takes_as_much_from_the_blocks(variant: str) -> None:
    checkpoint = harness.checkpoint(variant)
    blocks = checkpoint.config.block_parameters * checkpoint.config.num_hidden_layers
    assert block_budget(checkpoint, 0.25, "blocks") == round(0.75 * blocks)
    pruned = blocks - block_budget(checkpoint, 0.25, "model")
    assert pruned == round(0.25 * model_parameters(checkpoint))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_ratio_outside_of_0_and_1_is_refused(ratio: float) -> None:
    with pytest.raises(MasksError, match="between 0 and 1"):
        block_budget(harness.checkpoint("llama"), ratio, "blocks")


def test_a_ratio_of_something_else_is_refused() -> None:
    with pytest.raises(MasksError, match="'block'; choose one of blocks, model"):
        block_budget(harness.checkpoint("llama"), 0.5, "block")  # type: ignore[arg-type]


def test_the_facts_say_what_masks_keep() -> None:
    checkpoint, masks = harness.checkpoint("llama"), Masks.random(CONFIG, 0.4, 1)
    kept = masks.kept_parameters(CONFIG)
    facts = budget_facts(masks, checkpoint, "blocks")
    assert (facts["kept_parameters"], facts["ratio_of"]) == (str(kept), "blocks")
    assert float(facts["ratio_reached"]) == pytest.approx(1 - kept / DENSE, abs=1e-6)
    of_model = budget_facts(masks, checkpoint, "model")["ratio_reached"]
    assert float(of_model) == pytest.approx((DENSE - kept) / model_parameters(checkpoint), abs=1e-6)


def test_a_ratio_of_the_model_beyond_its_blocks_is_refused() -> None:
    with pytest.raises(MasksError, match="blocks hold"):
        block_budget(harness.checkpoint("llama"), 0.99, "model")


@given(st.floats(100.0, 1e9), st.floats(0.1, 10.0))
def test_the_regulariser_is_zero_at_the_budget_and_the_same_on_both_sides(budget: float, factor: float) -> None:
    above, at, below = (
        float(regulariser(torch.tensor(kept, dtype=torch.float64), budget))
        for kept in (budget * factor, budget, budget / factor)
    )
    assert at == pytest.approx(0.0, abs=1e-9)
    assert above == pytest.approx(below, abs=1e-6)
    assert above == pytest.approx(abs(np.log(factor)), abs=1e-6)


def parameters_of(widths: list[int]) -> int:
    named = [dict(zip(SETS, map(range, widths[at : at + 5]), strict=True)) for at in range(0, len(widths), 5)]
    return Masks.from_indices(named, CONFIG).kept_parameters(CONFIG)


def draw_latents(seed: int, spread: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    per_set = rng.normal(0, spread, len(set_widths(CONFIG)))
    return np.concatenate([rng.normal(mean, 1, width) for mean, width in zip(per_set, set_widths(CONFIG), strict=True)])


@given(st.integers(0, 99), st.floats(0, 4), st.floats(0.02, 0.95), st.sampled_from([1, 8, 16, 64]), st.booleans())
def test_final_sets_fit_the_budget_are_aligned_and_hold_the_highest_latents(
    seed: int, spread: float, ratio: float, align: int, tied: bool
) -> None:
    latents, budget = draw_latents(seed, spread), round((1 - ratio) * DENSE)
    if tied:  # most to each other, at a value whose means differ by their rounding
        latents = np.where(latents < 1, 0.1, latents)
    try:
        masks = final_sets(latents, CONFIG, budget, align=align)
    except MasksError:
        assert align > 1 and ratio > 0.5  # a single run of every set may be more than little is left
        return
    kept = masks.kept_parameters(CONFIG)
    assert kept <= budget
    widths = [len(indices) for block in masks.blocks for indices in block.sets().values()]
    for number, full in enumerate(set_widths(CONFIG)):  # no set could have been larger
        grown = list(widths)
        grown[number] = min(grown[number] + align, full)
        assert grown == widths or parameters_of(grown) > budget
    start = 0
    for block in masks.blocks:
        for name in SETS:
            indices = block.sets()[name]
            full = CONFIG.intermediate_size if name == "mlp.mid" else CONFIG.hidden_size
            assert len(indices) % align == 0 or len(indices) == full
            mine = latents[start : start + full]
            dropped = np.delete(mine, indices)
            assert not len(indices) or not len(dropped) or mine[indices].min() >= dropped.max()
            start += full
    assert final_sets(latents, CONFIG, budget, align=align).sha256() == masks.sha256()


def test_the_ratio_is_met_within_a_thousandth_at_a_real_models_sizes() -> None:
    from dataclasses import replace

    config = replace(
        CONFIG, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64
    )
    dense = config.block_parameters * config.num_hidden_layers
    latents = np.random.default_rng(0).normal(size=sum(set_widths(config)))
    for ratio in (0.2, 0.5):
        kept = final_sets(latents, config, round((1 - ratio) * dense)).kept_parameters(config)
        assert abs(kept / dense - (1 - ratio)) < 1e-3


def test_shared_sets_stay_equal() -> None:
    layout = Layout.make(CONFIG, constrained=True)
    latents = layout.expand(torch.randn(sum(layout.widths), generator=torch.Generator().manual_seed(0))).numpy()
    masks = final_sets(latents, CONFIG, DENSE // 2, groups=layout.vectors)
    first = masks.blocks[0].attention.read
    for block in masks.blocks:
        for indices in (block.attention.read, block.attention.write, block.mlp.read, block.mlp.write):
            np.testing.assert_array_equal(indices, first)
    assert len(first) < CONFIG.hidden_size


def test_a_budget_too_small_for_anything_is_refused() -> None:
    with pytest.raises(MasksError, match="no set of positions fits"):
        final_sets(draw_latents(0, 1), CONFIG, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_a_number_is_refused_with_its_set(value: float) -> None:
    latents = draw_latents(0, 1)
    latents[sum(set_widths(CONFIG)[:8]) + 5] = value
    with pytest.raises(MasksError, match=r"block 1, mlp\.mid: a score is not a number"):
        final_sets(latents, CONFIG, DENSE // 2)
