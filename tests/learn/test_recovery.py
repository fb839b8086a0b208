"""Recovery on a tiny model: it gains, it never ends worse, nothing outside of the sets moves, and no work is lost."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from student import recover_options, student
from transformers import AutoModelForCausalLM, PreTrainedModel

from dispc.learn import recovery
from dispc.learn.folder import METRICS
from dispc.learn.instant import instant_masks
from dispc.learn.recovered import write_pruned
from dispc.learn.recovery import Recovered, recover
from dispc.learn.recovery_options import MARKER, RecoverOptions, foreign_to_recovered
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.reference.masked import load_reference
from dispc.support.errors import ArtifactError, DispcError, Interrupted, LearnError

pytestmark = [
    pytest.mark.xdist_group("learn"),  # one worker, so that the student is taught once
    pytest.mark.usefixtures("own_cache"),
]


def masks_file(**changes: Any) -> Path:
    path = harness.scratch() / f"recovery-{'-'.join(map(str, changes.values()))}.safetensors"
    if not path.exists():
        masks = instant_masks(student(), "magnitude", 0.3, **changes)
        masks.save(path, Checkpoint(student()).config)
    return path


def options(folder: Path, **changes: Any) -> RecoverOptions:
    if changes.get("lora", 0) > 0:
        pytest.importorskip("peft")
    return recover_options(folder, **{"masks": masks_file()} | changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def load_plain(folder: Path) -> Any:
    """By transformers alone; its other attentions leave Gemma-2's softcap out."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("changes", [dict(loss="distil"), dict(loss="text"), dict(loss="both", lora=4)], ids=str)
def test_it_gains_on_held_out_text(tmp_path: Path, changes: dict[str, Any]) -> None:
    outcome, _ = recover(options(tmp_path, steps=60, evaluate_every=20, **changes))
    assert outcome.gained
    assert outcome.best["loss"] < 0.8 * outcome.begin["loss"]


@pytest.mark.parametrize("norm_scope", ["full", "selected"])
@pytest.mark.parametrize("lora", [0, 2])
def test_the_directory_is_the_pruned_model(tmp_path: Path, lora: int, norm_scope: str) -> None:
    chosen = options(tmp_path, lora=lora, masks=masks_file(norm_scope=norm_scope))
    recover(chosen)
    masks = Masks.load(chosen.output / "masks.safetensors")
    assert masks.sha256() == Masks.load(chosen.masks).sha256()
    before, after = weights(student()), weights(chosen.output)
    assert {name: one.shape for name, one in before.items()} == {name: one.shape for name, one in after.items()}
    assert (chosen.output / "config.json").read_bytes() == (student() / "config.json").read_bytes()
    ids = torch.arange(20)[None] % 50
    with torch.no_grad():
        masked = load_reference(Checkpoint(chosen.output), masks)(input_ids=ids).logits
        plain = load_plain(chosen.output)(input_ids=ids).logits
    same = torch.allclose(masked, plain, atol=1e-5)
    assert same == (norm_scope == "full")  # a norm that sees the read set only is not in the weights


def test_only_kept_weights_of_the_blocks_move(tmp_path: Path) -> None:
    chosen = options(tmp_path)
    recover(chosen)
    masks = Masks.load(chosen.masks)
    before, after = weights(student()), weights(chosen.output)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(before[name], after[name])
    for index, block in enumerate(masks.blocks):
        down = after[f"model.layers.{index}.mlp.down_proj.weight"]
        kept = torch.zeros_like(down)
        assert block.mlp.mid is not None
        kept[torch.from_numpy(block.mlp.write)[:, None], torch.from_numpy(block.mlp.mid)] = 1
        assert torch.equal(down * kept, down)
        assert not torch.equal(down, before[f"model.layers.{index}.mlp.down_proj.weight"] * kept)


def test_a_rate_that_harms_leaves_the_pruned_model(tmp_path: Path) -> None:
    chosen = options(tmp_path, learning_rate=3.0, warm_up=0.0, patience=2)
    outcome, _ = recover(chosen)
    assert not outcome.gained and outcome.best == outcome.begin
    after = weights(chosen.output)
    name = "model.layers.0.self_attn.q_proj.weight"
    kept = after[name] != 0
    assert torch.equal(after[name][kept], weights(student())[name][kept])


def test_no_number_ends_it_and_the_best_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = recovery.Recovery.losses

    def diverging(self: recovery.Recovery, ids: torch.Tensor) -> torch.Tensor:
        return losses(self, ids) * (float("nan") if self.step == 6 and torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(recovery.Recovery, "losses", diverging)
    chosen = options(tmp_path)
    outcome, _ = recover(chosen)
    assert outcome.steps == 6 and "not a number" in outcome.ended and outcome.best_step == 4
    assert json.loads((chosen.output / MARKER).read_text())["best_step"] == 4


@pytest.mark.parametrize("lora", [0, 2])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: int) -> None:
    whole = options(tmp_path / "whole", lora=lora)
    first, _ = recover(whole)
    parts = replace(whole, output=tmp_path / "parts" / "out")
    advance = recovery.Recovery.advance

    def stop_in_the_middle(self: recovery.Recovery, rows: Any) -> Any:
        record = advance(self, rows)
        self.stopping = self.step == 7
        return record

    with monkeypatch.context() as patched:
        patched.setattr(recovery.Recovery, "advance", stop_in_the_middle)
        with pytest.raises(Interrupted, match="stopped after step 7"):
            recover(parts)
    assert not parts.output.exists()
    second, _ = recover(parts, resume=True)
    assert first == second
    ours, theirs = weights(whole.output), weights(parts.output)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = [json.loads(line)["step"] for line in (parts.folder / METRICS).read_text().splitlines()]
    assert steps == list(range(13))


def test_minutes_end_it(tmp_path: Path) -> None:
    outcome, _ = recover(options(tmp_path, steps=10_000, minutes=0.02))
    assert isinstance(outcome, Recovered) and 0 < outcome.steps < 10_000


def test_bad_input_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.tex").touch()
    other = tmp_path / "other"
    config = json.loads((student() / "config.json").read_text())
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    short = tmp_path / "short.txt"
    short.write_text("a b c\n")
    for changes, reason in (
        (dict(teacher=other), "vocab_size"),
        (dict(data=str(short)), "too few"),
        (dict(output=tmp_path / "there"), "--force"),
        (dict(masks=tmp_path / "none.safetensors"), "no such mask file"),
        (dict(sequence_length=10**6), "positions"),
        (dict(held_out=str(short)), "too few"),
    ):
        with pytest.raises(DispcError, match=reason):
            recover(options(tmp_path, **changes))
    for changes in (dict(loss="none"), dict(lora=-1), dict(warm_up=1.0), dict(patience=0), dict(learning_rate=0.0)):
        with pytest.raises(LearnError):
            options(tmp_path, **changes)
    left = {path.name for path in tmp_path.iterdir()} - {"cache"}
    assert left == {"other", "short.txt", "there"}


def test_the_adapter_alone_makes_the_same_model(tmp_path: Path) -> None:
    chosen = options(tmp_path, lora=4)
    recover(chosen)
    checkpoint, masks = Checkpoint(student()), Masks.load(chosen.masks)
    write_pruned(checkpoint, masks, chosen.output / "adapter", tmp_path / "again")
    ours, theirs = weights(chosen.output), weights(tmp_path / "again")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)  # the adapter is in float16
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(theirs[name], weights(student())[name] * (theirs[name] != 0))


@pytest.mark.parametrize("damage", ["missing", "garbage", "other"])
def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    tensors = {f"base_model.model.none.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    if damage == "other":
        save_file(tensors, folder / "adapter_model.safetensors")
    elif damage == "garbage":
        (folder / "adapter_model.safetensors").write_bytes(b"garbage")
    with pytest.raises(DispcError, match="no adapter of this model"):
        write_pruned(Checkpoint(student()), Masks.load(masks_file()), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", ["phi3", "gpt-neox", "gemma2", "opt"])
def test_other_families_are_written_as_they_are_stored(tmp_path: Path, variant: str) -> None:
    checkpoint = harness.checkpoint(variant)
    masks = Masks.random(checkpoint.config, 0.5, seed=0)
    write_pruned(checkpoint, masks, None, tmp_path / "out")
    written = Checkpoint(tmp_path / "out")
    assert {name: one.shape for name, one in written.tensors.items()} == {
        name: one.shape for name, one in checkpoint.tensors.items()
    }
    ids = torch.arange(20)[None] % 50
    with torch.no_grad():
        masked = load_reference(checkpoint, masks)(input_ids=ids).logits
        plain = load_plain(tmp_path / "out")(input_ids=ids).logits
    assert torch.allclose(masked, plain, atol=1e-5)


def test_what_the_model_does_not_say_of_generation_is_not_said_for_it(tmp_path: Path) -> None:
    """transformers writes a generation_config.json of its own defaults, which overrules config.json."""
    model = shutil.copytree(harness.checkpoint("llama").directory, tmp_path / "model")
    (model / "generation_config.json").unlink(missing_ok=True)
    (model / "LICENSE").write_text("as you like")
    config = json.loads((model / "config.json").read_text()) | {"eos_token_id": [5, 6], "repetition_penalty": 1.3}
    (model / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(model)
    write_pruned(checkpoint, Masks.random(checkpoint.config, 0.5, seed=0), None, tmp_path / "out")
    assert Checkpoint(tmp_path / "out").generation == checkpoint.generation
    assert (tmp_path / "out" / "LICENSE").read_text() == "as you like"
    assert foreign_to_recovered(tmp_path / "out") is None


def test_a_full_disk_at_the_end_costs_nothing_but_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    chosen = options(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(ArtifactError, match="cannot be written .*No space left"):
            recover(chosen)
    assert not chosen.output.exists() and sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".recover"]
    outcome, _ = recover(chosen, resume=True)
    assert outcome.steps == 12 and chosen.output.is_dir()
