"""Learning and recovery of the families beyond the first six: a step lowers the loss, what is written is the model."""

import shutil
from pathlib import Path

import harness
import pytest
import tiny
import torch
from language import make_tokenizer
from student import options, recover_options
from transformers import AutoModelForCausalLM

from dispc.learn.recovery import recover
from dispc.learn.trainer import learn
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.reference.masked import load_reference

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(params=tiny.FURTHER)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model directory with a tokenizer."""
    directory = shutil.copytree(harness.checkpoint(str(request.param)).directory, tmp_path / "model")
    make_tokenizer(directory)
    return Path(directory)


def test_masks_are_learned_within_their_budget(model: Path, tmp_path: Path) -> None:
    config = Checkpoint(model).config
    masks, _ = learn(options(tmp_path, model=model, steps=2, pruning_ratio=0.3))
    kept = masks.kept_parameters(config) / (config.block_parameters * config.num_hidden_layers)
    assert kept == pytest.approx(0.7, abs=0.01)


def test_steps_of_recovery_lower_the_loss_and_the_pruned_model_is_written(model: Path, tmp_path: Path) -> None:
    masks = Masks.random(Checkpoint(model).config, 0.3, seed=1)
    masks.save(tmp_path / "masks.safetensors", Checkpoint(model).config)
    run = dict(steps=2, learning_rate=1e-3, evaluate_every=1, warm_up=0.0)
    chosen = recover_options(tmp_path, tmp_path / "masks.safetensors", model=model, **run)
    outcome, _ = recover(chosen)
    assert outcome.best["loss"] < outcome.begin["loss"]
    ids = torch.arange(20)[None] % 50
    plain = AutoModelForCausalLM.from_pretrained(chosen.output, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        masked = load_reference(Checkpoint(chosen.output), masks)(input_ids=ids).logits
        torch.testing.assert_close(masked, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
