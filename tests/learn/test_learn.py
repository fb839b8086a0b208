"""Learning on a tiny model that speaks a tiny language: it reaches its budget, beats chance, and never loses work."""

import json
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from sets import gates_of
from student import options, student, text
from transformers.models.llama.modeling_llama import LlamaMLP

from dispc.evaluate.perplexity import TorchScorer, measure_perplexity
from dispc.learn import trainer
from dispc.learn.folder import CHECKPOINT, METRICS
from dispc.learn.instant import instant_masks
from dispc.learn.trainer import learn
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint

pytestmark = [
    pytest.mark.xdist_group("learn"),  # one worker, so that the student is taught once
    pytest.mark.usefixtures("own_cache"),
]


def perplexity(masks: Masks, folder: Path) -> float:
    file = folder / "judged.safetensors"
    masks.save(file, Checkpoint(student()).config)
    scorer = TorchScorer(student(), file)
    return measure_perplexity(scorer, text("test.txt", 600, 3), sequence_length=64, max_windows=12).perplexity


def test_learned_masks_meet_the_budget_and_beat_every_instant_method(tmp_path: Path) -> None:
    masks, _ = learn(options(tmp_path, steps=150, pruning_ratio=0.3, batch_size=4, checkpoint_every=1000))
    config = Checkpoint(student()).config
    dense = config.block_parameters * config.num_hidden_layers
    for method in ("random", "magnitude", "activation"):
        rival = instant_masks(student(), method, 0.3, data=text("train.txt", 3000, 2), sequence_length=64)  # type: ignore[arg-type]
        for one in (rival, masks):
            assert 0 <= 0.7 * dense - one.kept_parameters(config) <= 4 * config.hidden_size
        assert perplexity(masks, tmp_path) < perplexity(rival, tmp_path), method
    pruned = [json.loads(line)["pruned"] for line in (tmp_path / "masks.learn" / METRICS).read_text().splitlines()]
    assert pruned[0] < 0.1 and np.mean(pruned[-20:]) == pytest.approx(0.3, abs=0.02)  # learned, not trimmed to it


@pytest.mark.parametrize(
    "changes",
    [
        dict(hypernetwork=False),
        dict(gru=False),
        dict(constrained=True),
        dict(estimator="gumbel"),
        dict(norm_scope="selected"),
        dict(align=8),
        dict(decay=True),
        dict(offset=6.0),
        dict(ratio_of="model", pruning_ratio=0.2),
    ],
    ids=str,
)
def test_every_variant_ends_within_its_budget(tmp_path: Path, changes: dict[str, Any]) -> None:
    chosen = options(tmp_path, steps=4, **changes)
    masks, _ = learn(chosen)
    checkpoint = Checkpoint(student())
    budget = trainer.block_budget(checkpoint, chosen.pruning_ratio, chosen.ratio_of)
    assert 0.9 * budget < masks.kept_parameters(checkpoint.config) <= budget
    saved = Masks.load(chosen.output)
    assert saved.sha256() == masks.sha256()
    assert (saved.norm_scope, saved.metadata["ratio_of"]) == (chosen.norm_scope, chosen.ratio_of)
    assert [json.loads(line)["step"] for line in (chosen.folder / METRICS).read_text().splitlines()] == [1, 2, 3, 4]


def learned_source(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """What three steps make of the source of latents: its parameters, the fixed inputs among them."""
    chosen = options(folder, steps=3, **changes)
    learn(chosen)
    source: dict[str, torch.Tensor] = torch.load(chosen.folder / CHECKPOINT, weights_only=True)["source"]
    return source


def test_an_ablation_learns_by_what_it_names(tmp_path: Path) -> None:
    blocks = Checkpoint(student()).config.num_hidden_layers
    full, free, linear, constrained = (
        learned_source(tmp_path / str(number), **changes)
        for number, changes in enumerate((dict(), dict(hypernetwork=False), dict(gru=False), dict(constrained=True)))
    )
    assert list(free) == ["latents"] and free["latents"].abs().max() > 0
    assert any(name.startswith("gru.") for name in full) and not any(name.startswith("gru.") for name in linear)
    assert {name for name in full if not name.startswith("gru.")} < set(linear)
    heads = [sum(name.startswith("heads.") for name in source) for source in (full, linear, constrained)]
    assert heads == [5 * blocks, 5 * blocks, 1 + blocks]
    for block in Masks.load(tmp_path / "3" / "masks.safetensors").blocks:
        shared = [indices.tolist() for name, indices in block.sets().items() if name != "mlp.mid"]
        assert all(indices == shared[0] for indices in shared)


@pytest.mark.parametrize(
    "changes",
    [
        dict(estimator="gumbel"),
        dict(offset=2.0),
        dict(regulariser_weight=0.0),
        dict(weight_decay=0.5),
        dict(decay=True),
        dict(learning_rate=2e-2),
        dict(norm_scope="selected"),
        dict(pruning_ratio=0.4),
    ],
    ids=str,
)
def test_every_option_of_the_method_changes_what_is_learned(tmp_path: Path, changes: dict[str, Any]) -> None:
    default, changed = learned_source(tmp_path / "default"), learned_source(tmp_path / "changed", **changes)
    assert any(not torch.equal(default[name], changed[name]) for name in default)


@pytest.mark.parametrize("variant", ["phi", "opt"])
def test_other_families_learn_too(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 131, 2000).astype(np.int32)
    monkeypatch.setattr(trainer, "load_tokens", lambda *_: tokens)
    masks, _ = learn(options(tmp_path, model=harness.checkpoint(variant).directory, steps=3))
    assert len(masks.blocks) == harness.checkpoint(variant).config.num_hidden_layers


def test_the_gated_loss_with_zero_one_gates_is_that_of_the_reference(tmp_path: Path) -> None:
    """What learning trains is what the compiler's reference computes, so that masks mean the same in both."""

    from dispc.learn.objective import GatedModel, next_token_loss
    from dispc.reference.masked import load_reference

    checkpoint = harness.checkpoint("llama")
    masks = Masks.random(checkpoint.config, 0.4, 1)
    ids = torch.from_numpy(harness.TOKENS)[None]
    dense = load_reference(checkpoint, None)
    gated = GatedModel(dense, checkpoint.config, "full")
    masked = load_reference(checkpoint, masks)
    expected = next_token_loss(masked(input_ids=ids, use_cache=False).logits, ids)
    torch.testing.assert_close(gated.loss(gates_of(masks), ids), expected)


def test_activation_checkpointing_runs_blocks_twice_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = LlamaMLP.forward, [0]

    def counted(self: LlamaMLP, *given: Any) -> Any:
        calls[-1] += 1
        return forward(self, *given)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    found = []
    for flag in (False, True):
        found.append(learn(options(tmp_path / str(flag), steps=3, activation_checkpointing=flag))[0].sha256())
        calls.append(0)
    assert found[0] == found[1]
    assert calls[1] == 2 * calls[0] > 0


def losses(folder: Path, **changes: Any) -> list[float]:
    chosen = options(folder, steps=3, **changes)
    learn(chosen)
    return [json.loads(line)["loss"] for line in (chosen.folder / METRICS).read_text().splitlines()]


def test_bfloat16_is_autocast_and_begins_near_float32(tmp_path: Path) -> None:
    exact, rough = losses(tmp_path / "exact"), losses(tmp_path / "rough", precision="bfloat16")
    assert 0 < abs(rough[0] - exact[0]) < 0.01 * exact[0]  # the same gates; later ones are drawn from other latents
    assert all(np.isfinite(rough))


def test_a_compiled_model_sees_the_gates_of_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced once, it might keep the first step's gates: torch.compile without a code generator shows that as well."""
    calls = []

    def compile_eagerly(self: torch.nn.Module) -> None:
        calls.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    compiled = losses(tmp_path / "compiled", compile=True)
    assert len(calls) == 1
    np.testing.assert_allclose(compiled, losses(tmp_path / "plain"), atol=1e-4)


def test_minutes_end_a_run_with_masks_of_the_budget(tmp_path: Path) -> None:
    masks, _ = learn(options(tmp_path, steps=100_000, minutes=0.02, decay=True, pruning_ratio=0.3))
    config = Checkpoint(student()).config
    assert 0.65 < masks.kept_parameters(config) / (config.block_parameters * config.num_hidden_layers) < 0.7001
    assert 0 < int(masks.metadata["steps"]) < 100_000


def test_the_rate_falls_by_the_steps_or_by_the_clock_whichever_is_further(tmp_path: Path) -> None:
    chosen = options(tmp_path, steps=100, minutes=1.0, decay=True, learning_rate=1.0)
    assert chosen.rate(50, 6.0) == pytest.approx(0.5)
    assert chosen.rate(10, 45.0) == pytest.approx(0.25)
    assert chosen.done(10, 60.0) == 1.0
