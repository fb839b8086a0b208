"""Tuning times what a target can run, keeps the fastest, and says so; which one that is, no test asserts."""

import errno
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import command
import harness
import numpy as np
import pytest
import torch
from sets import masks_of

from dispc.compiler import build_artifact
from dispc.masks import Masks
from dispc.plan import Choices, Plan
from dispc.quantisation import Quantisation
from dispc.runtime import doctor, tune
from dispc.support.errors import CompileError
from dispc.targets import TARGETS

LOWERINGS = {"inverse-gather", "canonical", "scatter-elements", "zero-filled", "feature-extractor"}


def fake_times(monkeypatch: pytest.MonkeyPatch, **faster: float) -> None:
    """Every lowering takes 1 ms per token, but for those given (`_` for `-`)."""

    def times(artifacts: dict[str, Path], plan: Plan, positions: int) -> dict[str, dict[str, float]]:
        return {
            name: {"first_token": 1.0, "one_token": faster.get(name.replace("-", "_"), 1.0)}
            for name, path in artifacts.items()
            if (path / "model.onnx").is_file()
        }

    monkeypatch.setattr(tune, "time_lowerings", times)
    monkeypatch.setattr(tune, "fit_costs", lambda width, plan, threads: plan.costs)


def test_the_command_times_every_lowering_and_the_artifact_is_right(tmp_path: Path) -> None:
    checkpoint = harness.checkpoint("llama")
    masks_of("llama").save(tmp_path / "m.safetensors", checkpoint.config)
    line = ("compile", checkpoint.directory, "--masks", tmp_path / "m.safetensors", "-t", "onnx-cpu", "--tune")
    outcome = command.run(*line, "-o", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome
    manifest = json.loads((tmp_path / "out" / "dispc.json").read_text())
    tuned = manifest["lowering"]["tuned"]
    assert set(tuned["milliseconds"]) == LOWERINGS
    assert all(found[key] > 0 for found in tuned["milliseconds"].values() for key in ("one_token", "first_token"))
    assert manifest["lowering"]["name"] in LOWERINGS and "--tune" in manifest["lowering"]["reason"]
    assert manifest["validation"]["passed"] and tuned["device"]
    outcome = command.run(*line, "-o", tmp_path / "out", "--force", "--no-validate")
    assert "one token, ms" in outcome.out and "scatter-elements" in outcome.out


@pytest.mark.parametrize("variant", ["opt", "phi", "qwen2"])
def test_other_families_are_sampled_too(variant: str) -> None:
    plan, record = tune.tune(harness.checkpoint(variant), masks_of(variant), "onnx-cpu", Choices(), build_artifact)
    assert plan.lowering.name in LOWERINGS and set(record.milliseconds) == LOWERINGS


@pytest.mark.parametrize(
    ("faster", "expected"),
    [
        (dict(inverse_gather=0.5), "inverse-gather"),
        (dict(zero_filled=0.9, inverse_gather=0.92), "zero-filled"),
        (dict(inverse_gather=0.96), "feature-extractor"),
        ({}, "feature-extractor"),
    ],
    ids=str,
)
def test_the_fastest_is_chosen_unless_it_is_only_noise(
    faster: dict[str, float], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_times(monkeypatch, **faster)
    plan, record = tune.tune(harness.checkpoint("llama"), masks_of("llama"), "onnx-cpu", Choices(), build_artifact)
    assert plan.lowering.name == expected
    assert set(record.milliseconds) == LOWERINGS


@pytest.mark.parametrize(
    ("times", "expected", "why"),
    [
        ({"inverse-gather": (1, 20), "canonical": (0.98, 19.5)}, "inverse-gather", "default"),
        ({"inverse-gather": (1, 20), "canonical": (1.03, 17), "zero-filled": (0.99, 18)}, "canonical", "with a prompt"),
        ({"inverse-gather": (1, 20), "canonical": (1.07, 10)}, "inverse-gather", "default"),
        ({"inverse-gather": (1, 20), "canonical": (0.9, 30)}, "canonical", "with a token"),
        (
            {"inverse-gather": (1, 20), "canonical": (0.9, 30), "zero-filled": (0.92, 20)},
            "zero-filled",
            "with a prompt",
        ),
        ({"inverse-gather": (1, 20), "canonical": (0.9, 20), "zero-filled": (0.92, 19.5)}, "canonical", "with a token"),
    ],
    ids=str,
)
def test_a_prompt_decides_among_those_that_decode_alike(
    times: dict[str, tuple[float, float]], expected: str, why: str
) -> None:
    milliseconds = {name: {"one_token": token, "first_token": prompt} for name, (token, prompt) in times.items()}
    chosen, reason = tune.choose(milliseconds, "inverse-gather")
    assert chosen == expected and why in reason


def test_zero_filled_as_the_default_of_a_target_can_be_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch)
    monkeypatch.setitem(TARGETS, "onnx-cpu", replace(TARGETS["onnx-cpu"], lowering="zero-filled"))
    checkpoint = harness.checkpoint("llama")
    for masks, expected in (
        (masks_of("llama"), "zero-filled"),
        (Masks.random(checkpoint.config, 0.9, 3), "inverse-gather"),
    ):
        assert tune.tune(checkpoint, masks, "onnx-cpu", Choices(), build_artifact)[0].lowering.name == expected


def test_only_what_the_target_can_run_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch)
    checkpoint, masks = harness.checkpoint("llama"), masks_of("llama")

    def timed(target: str, **choices: Any) -> set[str]:
        return set(tune.tune(checkpoint, masks, target, Choices(**choices), build_artifact)[1].milliseconds)

    monkeypatch.setattr(doctor, "cuda_problem", lambda: None)
    assert timed("onnx-cuda", dtype="bfloat16") == {"inverse-gather", "zero-filled"}
    assert timed("onnx", dtype="float16") == {"inverse-gather", "zero-filled"}
    quantisation = Quantisation(bits=4, block_size=32, symmetric=True, head=False, embedding=False)
    assert timed("onnx-cpu", quantisation=quantisation) == LOWERINGS - {"zero-filled"}
    masks = Masks.random(checkpoint.config, 0.9, 3)  # nothing that could be filled
    assert timed("onnx-cpu") == LOWERINGS - {"zero-filled"}


def test_some_blocks_hold_the_weights_of_those_blocks() -> None:
    whole = harness.checkpoint("llama")
    last = whole.config.num_hidden_layers - 1
    part = tune.SomeBlocks(whole, (last,))
    assert part.config.num_hidden_layers == 1
    for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
        assert part.find(f"model.layers.0.{name}") is whole.find(f"model.layers.{last}.{name}")
    embedding = whole.find("model.embed_tokens.weight").read()
    assert torch.equal(part.find("model.embed_tokens.weight").read(), embedding[: part.config.vocab_size])


def test_blocks_that_any_lowering_spells_alike_are_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch)
    checkpoint = harness.checkpoint("llama")
    count = checkpoint.config.num_hidden_layers
    none, some = dict.fromkeys(("attention.read", "mlp.read"), np.array([], dtype=np.int64)), {"mlp.read": [1, 5]}
    masks = Masks.from_indices([none] * (count - 1) + [some], checkpoint.config)
    assert tune.tune(checkpoint, masks, "onnx-cpu", Choices(), build_artifact)[1].blocks == (count - 1,)
    everything = [{}] * (count - 1) + [some]
    masks = Masks.from_indices(everything, checkpoint.config)
    assert tune.tune(checkpoint, masks, "onnx-cpu", Choices(), build_artifact)[1].blocks == (count - 1,)
    with pytest.raises(CompileError, match="no sub-layer reads or writes a part"):
        tune.tune(
            checkpoint, Masks.from_indices([none] * count, checkpoint.config), "onnx-cpu", Choices(), build_artifact
        )


def test_what_cannot_be_tuned_is_refused_in_one_line(tmp_path: Path) -> None:
    line = ("compile", harness.checkpoint("llama").directory, "--dense", "--tune", "-o", tmp_path / "out")
    for more, said in (
        (("-t", "onnx-cpu"), "no sub-layer reads or writes a part"),
        (("-t", "onnx", "--dtype", "bfloat16"), "no bfloat16 on the CPU"),
        (("-t", "onnx-cpu", "--lowering", "canonical"), "leave out --lowering"),
        (("-t", "onnx-cuda"), "--tune times the lowerings on CUDA, which is not here"),
    ):
        outcome = command.run(*line, *more)
        assert outcome.code == 2
        assert said in outcome.err and len(outcome.err.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(CompileError, match=r"--tune: .*: No space left"):
        tune.tune(harness.checkpoint("llama"), masks_of("llama"), "onnx-cpu", Choices(), full)
    assert not list(tmp_path.iterdir())


def test_what_was_tuned_is_what_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch, canonical=0.5)
    masks_of("llama").save(tmp_path / "m.safetensors", harness.checkpoint("llama").config)
    line = ("compile", harness.checkpoint("llama").directory, "--masks", tmp_path / "m.safetensors", "--tune")
    line += ("-t", "onnx-cpu", "-o", tmp_path / "out", "--verify-each", "--dump-ir", tmp_path / "ir", "--no-validate")
    assert command.run(*line).code == 0
    names = [path.name for path in (tmp_path / "ir").glob("*.onnx")]
    assert not [name for name in names if "inverse-gather" in name]  # the canonical form stays
