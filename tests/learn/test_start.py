"""Learning that begins with the ranking of an instant method."""

from pathlib import Path

import harness
import numpy as np
import pytest
import torch
from command import run
from hypothesis import given
from hypothesis import strategies as st
from student import arguments, options, student

from dispc.learn import start
from dispc.learn.budget import block_budget, final_sets, position_costs
from dispc.learn.folder import CHECKPOINT
from dispc.learn.hypernetwork import Layout
from dispc.learn.instant import instant_masks
from dispc.learn.start import CUT, HIGHEST, LOWEST, ranked
from dispc.learn.trainer import learn
from dispc.masks import Masks, set_widths
from dispc.model.checkpoint import Checkpoint
from dispc.support.errors import LearnError, MasksError

CONFIG = harness.checkpoint("llama").config
WIDTHS = set_widths(CONFIG)
METHODS = ("gradient", "middle", "activation", "magnitude", "random")

pytestmark = [
    pytest.mark.xdist_group("learn"),  # one worker, so that the student is taught once
    pytest.mark.usefixtures("own_cache"),
]


@given(st.floats(0.05, 0.9), st.integers(0, 999))
def test_latents_begin_in_the_order_of_the_scores_and_what_is_to_go_below_the_cut(pruned: float, seed: int) -> None:
    scores = np.random.default_rng(seed).lognormal(size=sum(WIDTHS))
    latents = ranked(scores, CONFIG, pruned).numpy()
    order = np.argsort(scores)
    assert (np.diff(latents[order]) >= 0).all()
    assert latents.min() >= LOWEST and latents.max() <= HIGHEST
    costs = np.repeat(position_costs(CONFIG) * CONFIG.num_hidden_layers, WIDTHS)
    assert costs[latents < CUT].sum() / costs.sum() == pytest.approx(pruned, abs=2 * costs.max() / costs.sum())


@pytest.mark.parametrize("method", METHODS)
def test_the_first_latents_select_what_the_method_does(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "TOKENS", 0)  # as many windows as the method alone reads
    chosen = options(tmp_path, steps=1, pruning_ratio=0.3, start_from=method)
    learn(chosen)
    first = torch.load(tmp_path / "masks.learn" / CHECKPOINT, weights_only=True)["source"]["first"]
    checkpoint = Checkpoint(student())
    instant = instant_masks(student(), method, 0.3, data=chosen.data, sequence_length=chosen.sequence_length)
    found = final_sets(first.numpy(), checkpoint.config, block_budget(checkpoint, 0.3, "blocks"))
    assert found.sha256() == instant.sha256()


def test_a_ranking_is_worth_steps(tmp_path: Path) -> None:
    """The loss of the first steps, in which half of the positions are out, is lower in the order of the gradient."""
    losses = []
    for method in ("gradient", "random"):
        found = list[float]()
        learn(
            options(tmp_path / method, start_from=method, offset=1.0),
            lambda record, steps, to=found: to.append(record["loss"]),
        )  # type: ignore[misc]
        losses.append(np.mean(found[:4]))
    assert losses[0] < losses[1]


def test_a_ranked_run_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    whole, _ = learn(options(tmp_path / "whole", start_from="gradient"))
    learn(options(tmp_path / "parts", start_from="gradient", steps=5))
    scored = list[int]()
    resumed, _ = learn(
        options(tmp_path / "parts", start_from="gradient"), resume=True, scoring=lambda done, total: scored.append(done)
    )
    assert resumed.sha256() == whole.sha256() and not scored  # the checkpoint has the ranking
    assert whole.sha256() != learn(options(tmp_path / "equal"))[0].sha256()
    assert (whole.metadata["start_from"], whole.metadata["method"]) == ("gradient", "disp-llm reinmax from gradient")


def test_a_run_with_another_start_is_not_resumed(tmp_path: Path) -> None:
    learn(options(tmp_path, steps=1, start_from="magnitude"))
    with pytest.raises(LearnError, match="that run has start_from=magnitude, this one None"):
        learn(options(tmp_path), resume=True)


def test_sets_that_share_a_vector_begin_with_their_mean(tmp_path: Path) -> None:
    layout = Layout.make(CONFIG, constrained=True)
    values = torch.rand(sum(WIDTHS))
    shared = torch.stack(
        [piece for piece, vector in zip(torch.split(values, WIDTHS), layout.vectors, strict=True) if vector == 0]
    )
    assert torch.equal(layout.collect(values)[: CONFIG.hidden_size], shared.mean(0))
    free = Layout.make(CONFIG)
    assert torch.equal(free.collect(values), values) and torch.equal(free.expand(values), values)
    learn(options(tmp_path, steps=1, start_from="magnitude", constrained=True))
    first, second, *_ = (block.sets() for block in Masks.load(tmp_path / "masks.safetensors").blocks)
    assert first["attention.read"].tolist() == second["mlp.write"].tolist()


def test_unusable_starts_are_named(tmp_path: Path) -> None:
    with pytest.raises(LearnError, match="start_from is 'gradients'; choose one of random, magnitude, "):
        learn(options(tmp_path, start_from="gradients"))
    assert not (tmp_path / "masks.learn").exists()
    with pytest.raises(MasksError, match="a score is not a number"):
        ranked(np.full(sum(WIDTHS), np.nan), CONFIG, 0.3)
    outcome = run(*arguments(tmp_path, "--method", "magnitude", "--start-from", "gradient"))
    assert outcome.code == 2 and "does not apply to --method magnitude" in outcome.err


def test_the_command_line_counts_the_windows(tmp_path: Path) -> None:
    outcome = run(*arguments(tmp_path, "--start-from", "gradient"))
    assert outcome.code == 0, outcome.err
    assert "ranking positions: window" in outcome.err
