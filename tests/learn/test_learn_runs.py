"""A run never loses work: it is resumed to the same bits, and stops where it can go on."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from command import run
from student import arguments, options, steps_of, student

from dispc.learn import trainer
from dispc.learn.folder import CHECKPOINT, METRICS, OPTIONS, RunFolder
from dispc.learn.trainer import Trainer, learn
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.text import TextTokens
from dispc.support.errors import LearnError
from dispc.support.signals import ENDING

pytestmark = [
    pytest.mark.xdist_group("learn"),  # one worker, so that the student is taught once
    pytest.mark.usefixtures("own_cache"),
]


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


@pytest.mark.extras
@pytest.mark.parametrize(("every", "lines"), [("1", 4), ("100000", 0)], ids=["checkpoints", "no checkpoint yet"])
def test_a_killed_run_goes_on_from_where_it_was_safe(tmp_path: Path, every: str, lines: int) -> None:
    metrics = tmp_path / "killed" / "masks.learn" / METRICS
    words = arguments(tmp_path / "killed", "--checkpoint-every", every, "--steps", "100000")
    command = [sys.executable, "-m", "dispc", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= lines):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    checkpoint = metrics.with_name(CHECKPOINT)
    saved = torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0
    assert (saved > 0) == (every == "1")
    steps = saved + 2
    resumed, _ = learn(options(tmp_path / "killed", steps=steps), resume=True)
    whole, _ = learn(options(tmp_path / "whole", steps=steps))
    assert resumed.sha256() == whole.sha256()
    assert steps_of(metrics) == list(range(1, steps + 1))


def test_metrics_are_cut_by_their_step(tmp_path: Path) -> None:
    learn(options(tmp_path, steps=5))
    metrics = tmp_path / "masks.learn" / METRICS
    lines = metrics.read_text().splitlines(keepends=True)
    del lines[1]
    metrics.write_text("".join(lines) + lines[-1].replace('"step": 5', '"step": 6') + '{"step": 7, "lo')
    learn(options(tmp_path, steps=7), resume=True)
    assert steps_of(metrics) == [1, 3, 4, 5, 6, 7]


def test_metrics_with_bytes_of_nonsense_do_not_stop_a_run(tmp_path: Path) -> None:
    learn(options(tmp_path, steps=2))
    metrics = tmp_path / "masks.learn" / METRICS
    metrics.write_bytes(metrics.read_bytes() + b"\xff\xfe\x00")
    learn(options(tmp_path, steps=3), resume=True)
    assert steps_of(metrics) == [1, 2, 3]


def test_a_finished_run_that_is_resumed_keeps_what_was_recorded(tmp_path: Path) -> None:
    chosen = options(tmp_path, steps=2)
    masks, _ = learn(chosen)
    masks.with_metadata({"perplexity": "9.9 on a.txt"}).save(chosen.output, Checkpoint(student()).config)
    learn(chosen, resume=True)
    assert Masks.load(chosen.output).metadata["perplexity"] == "9.9 on a.txt"
    learn(dataclasses.replace(chosen, steps=12), resume=True)  # other sets: it is not theirs
    assert "perplexity" not in Masks.load(chosen.output).metadata


def test_tensorboard_gets_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[int, float] = {}

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "masks.learn" / "tensorboard")
            for step in [step for step in shown if step >= purge_step]:
                del shown[step]

        def __enter__(self) -> "Writer":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def add_scalar(self, name: str, value: float, step: int) -> None:
            if name == "loss":
                assert step not in shown
                shown[step] = value

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Mock(SummaryWriter=Writer))
    monkeypatch.setattr(trainer, "need", Mock())
    chosen = options(tmp_path, steps=7, checkpoint_every=5, tensorboard=True)

    def stop_at_step_6(record: Mapping[str, float], steps: int) -> None:
        if record["step"] == 6:
            shown[6] = -1.0  # was written before the kill, and is after the checkpoint
            raise InterruptedError

    with pytest.raises(InterruptedError):
        learn(chosen, stop_at_step_6)
    learn(chosen, resume=True)
    lines = [json.loads(line) for line in (tmp_path / "masks.learn" / METRICS).read_text().splitlines()]
    assert shown == {line["step"]: line["loss"] for line in lines} and len(lines) == 7


def test_metrics_that_cannot_be_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "cut_metrics", lambda folder, step: folder.metrics.symlink_to("/dev/full"))
    with pytest.raises(LearnError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        learn(options(tmp_path, steps=2))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Trainer.advance

    def poisoned(self: Trainer, rows: TextTokens) -> dict[str, float]:
        if self.step == 7:
            next(self.gated.model.parameters()).data.fill_(float("nan"))
        return advance(self, rows)

    monkeypatch.setattr(Trainer, "advance", poisoned)
    with pytest.raises(LearnError, match=r"step 8: .*checkpoint\.pt with --resume and a --learning-rate below 0\.01"):
        learn(options(tmp_path))
    assert torch.load(tmp_path / "masks.learn" / CHECKPOINT, weights_only=True)["step"] == 5
    monkeypatch.undo()
    mended, _ = learn(options(tmp_path, learning_rate=1e-3), resume=True)  # as the message says
    assert mended.metadata["learning_rate"] == "0.001"


def test_a_gradient_that_is_no_number_reaches_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is a number here, and so is the regulariser: only its gradient is not."""
    seen: list[Trainer] = []
    advance = Trainer.advance

    def spied(self: Trainer, rows: TextTokens) -> dict[str, float]:
        seen.append(self)
        return advance(self, rows)

    monkeypatch.setattr(Trainer, "advance", spied)
    monkeypatch.setattr(trainer, "regulariser", lambda kept, budget: (kept - kept.detach()).abs().sqrt())
    with pytest.raises(LearnError, match="step 1: the loss or its gradient is not a number; start again with --resume"):
        learn(options(tmp_path))
    assert all(bool(torch.isfinite(value).all()) for value in seen[0].source.state_dict().values())


@pytest.mark.extras
def test_a_finished_run_whose_metrics_are_gone_is_still_finished(tmp_path: Path) -> None:
    assert run(*arguments(tmp_path)).code == 0
    (tmp_path / "masks.learn" / METRICS).unlink()
    outcome = run(*arguments(tmp_path, "--resume"))
    assert outcome.code == 0, outcome.err


@pytest.mark.extras
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
    outcome = run(*arguments(tmp_path, "--checkpoint-every", "5"))
    errors = [line for line in outcome.err.splitlines() if not line.startswith("step ")]
    assert outcome.code == 2 and len(errors) == 1 and errors[0].endswith("No space left on device"), outcome.err
    folder = tmp_path / "masks.learn"
    assert torch.load(folder / CHECKPOINT, weights_only=True)["step"] == calls[0]
    assert not list(folder.glob("*.partial"))


@pytest.mark.extras
def test_a_file_that_may_not_grow_is_one_line_too(tmp_path: Path) -> None:
    """The limit is the system's: whatever torch makes of a write that fails is what people see."""
    done = subprocess.run(
        [sys.executable, "-m", "dispc", *arguments(tmp_path, "--checkpoint-every", "1")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
    assert done.returncode == 2 and len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    assert CHECKPOINT in errors[0]
    assert sorted(path.name for path in (tmp_path / "masks.learn").iterdir()) == [METRICS, OPTIONS]


@pytest.mark.extras
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_the_run_behind_its_step_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole, _ = learn(options(tmp_path / "whole"))
    advance = Trainer.advance

    def struck(self: Trainer, rows: TextTokens) -> dict[str, float]:
        if self.step == 3:
            os.kill(os.getpid(), number)
        return advance(self, rows)

    monkeypatch.setattr(Trainer, "advance", struck)
    outcome = run(*arguments(tmp_path / "parts"))
    assert outcome.code == 128 + number
    assert outcome.err.splitlines()[-1] == "error: stopped after step 4; go on with --resume"
    assert torch.load(tmp_path / "parts" / "masks.learn" / CHECKPOINT, weights_only=True)["step"] == 4
    monkeypatch.undo()
    outcome = run(*arguments(tmp_path / "parts"), "--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["sha256"] == whole.sha256()


@pytest.mark.extras
def test_a_second_interrupt_does_not_wait_and_says_where_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def struck(self: Trainer, rows: TextTokens) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one ends the step")

    monkeypatch.setattr(Trainer, "advance", struck)
    outcome = run(*arguments(tmp_path))
    assert outcome.code == 130
    assert outcome.err == "error: interrupted in step 1; go on from the latest checkpoint with --resume\n"


def test_another_alignment_may_be_tried_on_what_was_learned(tmp_path: Path) -> None:
    learn(options(tmp_path, steps=2, align=8))
    masks, _ = learn(options(tmp_path, steps=2, align=4), resume=True)
    assert masks.sha256() == learn(options(tmp_path / "once", steps=2, align=4))[0].sha256()
