"""Learning on a tiny model that speaks a tiny language: it reaches its budget, beats chance, and never loses work."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import harness
import language
import numpy as np
import pytest
import torch
from command import assert_refused, run

from dispc import corpus
from dispc.checkpoint import Checkpoint
from dispc.errors import LearnError
from dispc.learn import trainer
from dispc.learn.instant import instant_masks
from dispc.learn.options import LearnOptions
from dispc.learn.trainer import CHECKPOINT, METRICS, Trainer, learn
from dispc.masks import Masks
from dispc.validate.perplexity import TorchScorer, measure_perplexity

pytestmark = pytest.mark.xdist_group("learn")  # one worker, so that the student is taught once


@cache
def student() -> Path:
    return language.make_student("llama", harness.scratch() / "student")


@cache
def text(name: str, words: int, seed: int) -> str:
    path = harness.scratch() / name
    path.write_text(language.make_text(words, seed))
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def options(folder: Path, **changes: Any) -> LearnOptions:
    defaults: dict[str, Any] = dict(
        model=student(), data=text("train.txt", 3000, 2), output=folder / "masks.safetensors", steps=12,
        sequence_length=32, batch_size=2, learning_rate=1e-2, checkpoint_every=5, device="cpu",
    )  # fmt: skip
    return LearnOptions(**defaults | changes)


def perplexity(masks: Masks, folder: Path) -> float:
    file = folder / "judged.safetensors"
    masks.save(file, Checkpoint(student()).config)
    scorer = TorchScorer(student(), file)
    return measure_perplexity(scorer, text("test.txt", 600, 3), sequence_length=64, max_windows=12).perplexity


def test_learned_masks_meet_the_budget_and_beat_every_instant_method(tmp_path: Path) -> None:
    masks, _ = learn(options(tmp_path, steps=150, pruning_ratio=0.3, batch_size=4, checkpoint_every=1000))
    config = Checkpoint(student()).config
    dense = config.block_parameters * config.num_hidden_layers
    for method in ("random", "magnitude"):
        rival = instant_masks(student(), method, 0.3)  # type: ignore[arg-type]
        for one in (rival, masks):
            assert 0 <= 0.7 * dense - one.kept_parameters(config) <= 4 * config.hidden_size
        assert perplexity(masks, tmp_path) < perplexity(rival, tmp_path), method


@pytest.mark.parametrize(
    "changes",
    [
        dict(hypernetwork=False), dict(gru=False), dict(constrained=True), dict(estimator="gumbel"),
        dict(norm_scope="selected"), dict(align=8), dict(decay=True), dict(offset=6.0),
        dict(ratio_of="model", pruning_ratio=0.2),
    ],
    ids=str,
)  # fmt: skip
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


@pytest.mark.parametrize("variant", ["phi", "opt"])
def test_other_families_learn_too(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 131, 2000).astype(np.int32)
    monkeypatch.setattr(trainer, "load_tokens", lambda *_: tokens)
    masks, _ = learn(options(tmp_path, model=harness.checkpoint(variant).directory, steps=3))
    assert len(masks.blocks) == harness.checkpoint(variant).config.num_hidden_layers


def test_the_gated_loss_with_zero_one_gates_is_that_of_the_reference(tmp_path: Path) -> None:
    """What learning trains is what the compiler's reference computes, so that masks mean the same in both."""
    from test_budget import gates_of

    from dispc.learn.objective import GatedModel, next_token_loss
    from dispc.reference import load_reference

    checkpoint = harness.checkpoint("llama")
    masks = Masks.random(checkpoint.config, 0.4, 1)
    ids = torch.from_numpy(harness.TOKENS)[None]
    dense = load_reference(checkpoint.directory, checkpoint.family, None)
    gated = GatedModel(dense, checkpoint.config, "full")
    masked = load_reference(checkpoint.directory, checkpoint.family, masks)
    expected = next_token_loss(masked(input_ids=ids, use_cache=False).logits, ids)
    torch.testing.assert_close(gated.loss(gates_of(masks), ids), expected)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    found = [
        learn(options(tmp_path / str(flag), steps=3, activation_checkpointing=flag))[0].sha256()
        for flag in (False, True)
    ]
    assert found[0] == found[1]


def test_resuming_gives_the_same_bits(tmp_path: Path) -> None:
    whole, _ = learn(options(tmp_path / "whole"))
    learn(options(tmp_path / "parts", steps=5))
    resumed, _ = learn(options(tmp_path / "parts"), resume=True)
    assert resumed.sha256() == whole.sha256()
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / part / "masks.learn" / METRICS).read_text().splitlines()]
        for part in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    states = [
        torch.load(tmp_path / part / "masks.learn" / CHECKPOINT, weights_only=True) for part in ("whole", "parts")
    ]
    for name, value in states[0]["source"].items():
        assert torch.equal(value, states[1]["source"][name])


def test_a_falling_rate_is_resumed_where_it_was(tmp_path: Path) -> None:
    def stop_at_step_7(record: dict[str, float], steps: int) -> None:
        if record["step"] == 7:
            raise InterruptedError

    whole, _ = learn(options(tmp_path / "whole", decay=True))
    with pytest.raises(InterruptedError):
        learn(options(tmp_path / "parts", decay=True), stop_at_step_7)
    resumed, _ = learn(options(tmp_path / "parts", decay=True), resume=True)
    assert resumed.sha256() == whole.sha256()
    assert resumed.sha256() != learn(options(tmp_path / "constant"))[0].sha256()
    with pytest.raises(LearnError, match=r"steps=12, this one 20"):
        learn(options(tmp_path / "parts", decay=True, steps=20), resume=True)


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    arguments = [
        "learn", str(student()), "--data", text("train.txt", 3000, 2),
        "-o", str(tmp_path / "killed" / "masks.safetensors"),
        "--sequence-length", "32", "--batch-size", "2", "--learning-rate", "1e-2", "--checkpoint-every", "1",
        "--device", "cpu",
    ]  # fmt: skip
    metrics = tmp_path / "killed" / "masks.learn" / METRICS
    command = [sys.executable, "-m", "dispc", *arguments, "--steps", "100000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    saved = torch.load(metrics.with_name(CHECKPOINT), weights_only=True)["step"]
    assert saved >= 1
    steps = saved + 2
    resumed, _ = learn(options(tmp_path / "killed", steps=steps), resume=True)
    whole, _ = learn(options(tmp_path / "whole", steps=steps))
    assert resumed.sha256() == whole.sha256()
    assert len(metrics.read_text().splitlines()) == steps


def test_a_resumed_run_must_have_the_same_options(tmp_path: Path) -> None:
    learn(options(tmp_path, steps=1))
    with pytest.raises(LearnError, match=r"seed=0, this one 5"):
        learn(options(tmp_path, seed=5), resume=True)


def test_an_older_run_is_kept_unless_forced(tmp_path: Path) -> None:
    learn(options(tmp_path, steps=1))
    with pytest.raises(LearnError, match="--force"):
        learn(options(tmp_path, steps=2))
    learn(options(tmp_path, steps=2), force=True)
    assert len((tmp_path / "masks.learn" / METRICS).read_text().splitlines()) == 2


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    learn(options(tmp_path, steps=1))
    (tmp_path / "masks.learn" / CHECKPOINT).write_bytes(content)
    with pytest.raises(LearnError, match=CHECKPOINT):
        learn(options(tmp_path, steps=2), resume=True)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Trainer.advance

    def poisoned(self: Trainer, ids: torch.Tensor) -> dict[str, float]:
        if self.step == 7:
            next(self.gated.model.parameters()).data.fill_(float("nan"))
        return advance(self, ids)

    monkeypatch.setattr(Trainer, "advance", poisoned)
    with pytest.raises(LearnError, match=r"step 8: .*checkpoint\.pt"):
        learn(options(tmp_path))
    assert torch.load(tmp_path / "masks.learn" / CHECKPOINT, weights_only=True)["step"] == 5


def test_a_full_disk_is_one_line_and_keeps_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, []

    def full(content: Any, file: Any) -> None:
        calls.append(content["step"])
        if len(calls) > 1:
            file.write(b"half")
            raise OSError(28, "No space left on device", str(file.name))
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        learn(options(tmp_path))
    folder = tmp_path / "masks.learn"
    assert torch.load(folder / CHECKPOINT, weights_only=True)["step"] == calls[0]
    assert not list(folder.glob("*.partial"))


def test_the_order_of_the_data_depends_on_the_seed_alone() -> None:
    rows = np.arange(20, dtype=np.int32).reshape(10, 2)
    epoch = np.concatenate([corpus.batch(rows, step, 2, seed=3) for step in range(5)])
    assert sorted(epoch[:, 0].tolist()) == sorted(rows[:, 0].tolist())
    np.testing.assert_array_equal(corpus.batch(rows, 3, 2, seed=3), epoch[6:8])
    np.testing.assert_array_equal(corpus.batch(rows, 0, 10, seed=3), epoch)
    assert any(
        not np.array_equal(corpus.batch(rows, step, 2, seed=4), corpus.batch(rows, step, 2, seed=3))
        for step in range(5)
    )


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    common = [
        "learn", str(student()), "--data", text("train.txt", 3000, 2), "--sequence-length", "32", "--batch-size", "2",
        "--learning-rate", "1e-2", "--steps", "20", "--device", "cpu",
    ]  # fmt: skip
    for name, start in (("one", []), ("two", ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"])):
        output = tmp_path / name / "masks.safetensors"
        done = subprocess.run(
            [sys.executable, "-m", *start, "dispc", *common, "-o", str(output)],
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "masks.learn" / METRICS).read_text().splitlines()]
        for name in ("one", "two")
    )
    np.testing.assert_allclose(one, two, atol=1e-4, rtol=0)
    assert len(one) == 20


class TestTheCommand:
    def arguments(self, tmp_path: Path, **changes: str) -> list[str]:
        chosen = {
            "--data": text("train.txt", 3000, 2), "--steps": "2", "--sequence-length": "32", "--device": "cpu",
            "-o": str(tmp_path / "m.safetensors"),
        } | changes  # fmt: skip
        return ["learn", str(student()), *(part for pair in chosen.items() for part in pair)]

    @pytest.mark.extras
    def test_learns_draws_and_reports(self, tmp_path: Path) -> None:
        outcome = run(*self.arguments(tmp_path), "--json")
        assert outcome.code == 0, outcome.err
        report = json.loads(outcome.out)
        assert report["sha256"] == Masks.load(tmp_path / "m.safetensors").sha256()
        for picture in ("learning.png", "widths.png"):
            assert (tmp_path / "m.learn" / picture).read_bytes().startswith(b"\x89PNG")
        assert run("inspect", tmp_path / "m.safetensors", "--plot", tmp_path / "w.svg").code == 0
        assert "<svg" in (tmp_path / "w.svg").read_text()

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"--pruning-ratio": "1.5"}, "between 0 and 1"),
            ({"--ratio-of": "everything"}, "blocks, model"),
            ({"--ratio-of": "model", "--pruning-ratio": "0.95"}, "blocks hold"),
            ({"--sequence-length": "4096"}, "--sequence-length"),
            ({"--data": "nowhere.txt"}, "no such file"),
            ({"--method": "luck"}, "choose disp-llm, random"),
            ({"--steps": "0"}, "steps is 0"),
        ],
        ids=lambda value: str(value),
    )
    def test_refuses_bad_input_in_one_line(self, tmp_path: Path, changes: dict[str, str], says: str) -> None:
        (tmp_path / "cache").mkdir()
        assert_refused(tmp_path, *self.arguments(tmp_path, **changes), says=(says,))

    @pytest.mark.parametrize(("content", "says"), [("", "holds no text"), ("the sea", "too few")])
    def test_refuses_too_little_text(self, tmp_path: Path, content: str, says: str) -> None:
        place, data = tmp_path / "place", tmp_path / "short.txt"
        place.mkdir()
        data.write_text(content)
        assert_refused(place, *self.arguments(place, **{"--data": str(data)}), says=(says,))

    @pytest.mark.parametrize("method", ["random", "magnitude", "activation"])
    def test_instant_methods_write_masks_of_the_budget(self, tmp_path: Path, method: str) -> None:
        outcome = run(*self.arguments(tmp_path, **{"--method": method}), "--pruning-ratio", "0.3")
        assert outcome.code == 0, outcome.err
        masks = Masks.load(tmp_path / "m.safetensors")
        config = Checkpoint(student()).config
        kept = masks.kept_parameters(config) / (config.block_parameters * config.num_hidden_layers)
        assert 0.69 < kept <= 0.7
        assert masks.metadata["method"] == method


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(LearnError, match="--no-gru"):
        dataclasses.replace(options(Path("x")), hypernetwork=False, gru=False)
