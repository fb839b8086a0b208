"""A run's folder: what may go on from it, what may replace it, and what is refused with nothing touched."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from command import fingerprint
from damage import DAMAGED_PICKLES
from safetensors.torch import load_file, save_file
from student import options, steps_of, student, text

from dispc.learn import trainer
from dispc.learn.folder import BOARD, CHECKPOINT, LEARNING, METRICS, OPTIONS, read_metrics
from dispc.learn.plots import plot_run
from dispc.learn.trainer import learn
from dispc.model.text import load_tokens
from dispc.support.errors import DispcError, LearnError, MasksError

NO_PROCESS = 2**22 + 1  # Linux gives no higher number than 2**22
pytestmark = [
    pytest.mark.xdist_group("learn"),  # one worker, so that the student is taught once
    pytest.mark.usefixtures("own_cache"),
]


@pytest.mark.parametrize(
    "content",
    ["", '{"steps": 1', "[]", "\udcff", '{"steps":' + "[" * 100_000, '{"steps": 1}'],
    ids=["empty", "half", "list", "bytes", "deep", "another's"],
)
def test_unreadable_options_are_named(tmp_path: Path, content: str) -> None:
    learn(options(tmp_path, steps=1))
    (tmp_path / "masks.learn" / OPTIONS).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(LearnError, match=OPTIONS) as raised:
        learn(options(tmp_path, steps=2), resume=True)
    assert "\n" not in str(raised.value) and "choose another -o" in str(raised.value)


def test_options_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn(options(tmp_path, steps=1))
    recorded = (tmp_path / "masks.learn" / OPTIONS).read_text()

    def torn(self: Path, content: str, **encoding: str) -> int:
        with self.open("w") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="No space left"):
        learn(options(tmp_path, steps=2), resume=True)
    assert (tmp_path / "masks.learn" / OPTIONS).read_text() == recorded
    assert not list(tmp_path.rglob("*.partial"))


def other_config(place: Path) -> None:
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def other_weights(place: Path) -> None:
    file = place / "model" / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def other_text(place: Path) -> None:
    (place / "text.txt").write_text(Path(text("valid.txt", 2000, 3)).read_text())


@pytest.mark.parametrize(
    ("change", "says"),
    [(other_config, "configurations"), (other_weights, "the model's weights"), (other_text, "the tokens of the texts")],
)
def test_a_run_on_another_model_or_text_is_refused(tmp_path: Path, change: Callable[[Path], None], says: str) -> None:
    model = Path(shutil.copytree(student(), tmp_path / "model"))
    data = shutil.copy(text("train.txt", 3000, 2), tmp_path / "text.txt")
    learn(options(tmp_path, model=model, data=str(data), steps=1))
    change(tmp_path)
    load_tokens(str(data), model)  # the cache may grow
    before = fingerprint(tmp_path)
    with pytest.raises(LearnError, match=rf"checkpoint\.pt: is of another run: .*{says} differ"):
        learn(options(tmp_path, model=model, data=str(data), steps=2), resume=True)
    assert fingerprint(tmp_path) == before


def test_model_and_text_may_have_moved(tmp_path: Path) -> None:
    model = Path(shutil.copytree(student(), tmp_path / "model"))
    learn(options(tmp_path, model=model, steps=1))
    moved = shutil.copy(text("train.txt", 3000, 2), tmp_path / "moved.txt")
    masks, _ = learn(options(tmp_path, data=str(moved), steps=2), resume=True)
    assert masks.sha256() == learn(options(tmp_path / "at once", steps=2))[0].sha256()


def test_fewer_steps_than_were_made_are_refused(tmp_path: Path) -> None:
    learn(options(tmp_path, steps=3))
    with pytest.raises(LearnError, match="is of step 3, steps is 2; resume with --steps 3 or more"):
        learn(options(tmp_path, steps=2), resume=True)


def test_every_output_has_a_folder_of_its_own(tmp_path: Path) -> None:
    names = ("run-0.5", "run-0.25", "run", "run.pt", "run.0.safetensors")
    chosen = [dataclasses.replace(options(tmp_path, steps=1), output=tmp_path / name) for name in names]
    for each in chosen:
        learn(each)
    assert len({each.folder for each in chosen} | {each.output for each in chosen}) == 2 * len(names)
    assert chosen[-1].folder == tmp_path / "run.0.learn"


def test_a_directory_is_no_output(tmp_path: Path) -> None:
    for force in (False, True):
        with pytest.raises(MasksError, match="is a directory"):
            learn(dataclasses.replace(options(tmp_path, steps=1), output=tmp_path), force=force)


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


@pytest.mark.parametrize("reason", ["no tensorboard", "short data", "no memory"])
def test_force_keeps_the_older_run_until_the_new_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    learn(options(tmp_path, steps=1))
    before, changes = fingerprint(tmp_path / "masks.learn"), dict[str, Any]()
    if reason == "no tensorboard":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        changes = dict(tensorboard=True)
    elif reason == "short data":
        changes = dict(data=text("short.txt", 2, 2))
    else:
        monkeypatch.setattr(trainer, "mask_model", Mock(side_effect=MemoryError))
    with pytest.raises((DispcError, MemoryError)):
        learn(options(tmp_path, steps=2, **changes), force=True)
    assert fingerprint(tmp_path / "masks.learn") == before and (tmp_path / "masks.safetensors").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", *DAMAGED_PICKLES])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    learn(options(tmp_path, steps=1))
    (tmp_path / "masks.learn" / CHECKPOINT).write_bytes(content)
    with pytest.raises(LearnError, match=CHECKPOINT):
        learn(options(tmp_path, steps=2), resume=True)


def test_a_forced_run_removes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    scratch, folder = tmp_path / "scratch", tmp_path / "masks.learn"
    scratch.mkdir()
    folder.symlink_to(scratch)
    (scratch / "thesis.txt").write_text("mine")
    (scratch / f"{CHECKPOINT}.{NO_PROCESS}.partial").write_text("of a run that was killed")
    (scratch / "mine.partial").write_text("mine")
    learn(options(tmp_path, steps=1), force=True)
    assert torch.load(scratch / CHECKPOINT, weights_only=True)["step"] == 1

    def stop(record: dict[str, float], steps: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        learn(options(tmp_path, steps=2, seed=1), stop, force=True)
    assert (scratch / "thesis.txt").read_text() == "mine" and folder.is_symlink()
    assert {path.name for path in scratch.iterdir()} == {
        "thesis.txt",
        "mine.partial",
        METRICS,
        OPTIONS,
    }  # no checkpoint of seed 0
    learn(options(tmp_path, steps=2, seed=1), resume=True, force=True)
    assert steps_of(scratch / METRICS) == [1, 2]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", [CHECKPOINT, METRICS, LEARNING, f"{BOARD}/events.out.tfevents.1"])
@pytest.mark.parametrize("recorded", [None, '{"lr": 1}'], ids=["no options", "options of another tool"])
def test_a_folder_that_no_run_of_dispc_wrote_is_left_alone(
    tmp_path: Path, name: str, recorded: str | None, resume: bool
) -> None:
    file = tmp_path / "masks.learn" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    if recorded is not None:
        (tmp_path / "masks.learn" / OPTIONS).write_text(recorded)
    before = fingerprint(tmp_path)
    with pytest.raises(LearnError, match="of a run of dispc; move its folder away"):
        learn(options(tmp_path, steps=1), resume=resume, force=True)
    assert fingerprint(tmp_path) == before


def test_a_forced_run_keeps_the_board_of_somebody_else(tmp_path: Path) -> None:
    learn(options(tmp_path, steps=1))
    events = tmp_path / "masks.learn" / BOARD / "events.out.tfevents.1"
    events.parent.mkdir()
    events.write_text("mine")
    learn(options(tmp_path, steps=1), force=True)
    assert events.read_text() == "mine"


@pytest.mark.parametrize("name", [OPTIONS, CHECKPOINT, METRICS, LEARNING])
def test_a_pipe_in_the_folder_is_refused_before_anything_waits_for_it(tmp_path: Path, name: str) -> None:
    learn(options(tmp_path, steps=1))
    (tmp_path / "masks.learn" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "masks.learn" / name)
    with pytest.raises(LearnError, match=f"{name}: is no regular file"):
        learn(options(tmp_path, steps=2), resume=True)


def test_lines_of_metrics_that_no_step_wrote_are_passed_over(tmp_path: Path) -> None:
    learn(options(tmp_path, steps=1))
    metrics = tmp_path / "masks.learn" / METRICS
    strange = ('{"step": 0}', '{"step":' + "[" * 100_000, "[]", '{"step": 0, "loss": "x"}', f'{{"step": {"9" * 400}}}')
    metrics.write_text(metrics.read_text() + "".join(f"{line}\n" for line in strange))
    masks, _ = learn(options(tmp_path, steps=2), resume=True)
    plot_run(tmp_path / "masks.learn", masks)
    assert [record["step"] for record in read_metrics(metrics)] == [1, 0, 0, 2]


def test_a_run_goes_on_in_the_precision_that_it_had(tmp_path: Path) -> None:
    """Which one is the default depends on the device, and that may change."""
    learn(options(tmp_path, steps=1))
    assert json.loads((tmp_path / "masks.learn" / OPTIONS).read_text())["precision"] == "float32"
    assert options(tmp_path).settled(torch.device("cuda")).precision == "bfloat16"
    learn(options(tmp_path, steps=2, precision="float32"), resume=True)
    with pytest.raises(LearnError, match="precision=float32, this one bfloat16"):
        learn(options(tmp_path, steps=3, precision="bfloat16"), resume=True)


@pytest.mark.parametrize("content", [{"version": 2}, {"version": 2, "inputs": 3}, torch.zeros(2), [1]], ids=str)
def test_what_is_no_checkpoint_of_a_run_is_called_that(tmp_path: Path, content: Any) -> None:
    learn(options(tmp_path, steps=1))
    torch.save(content, tmp_path / "masks.learn" / CHECKPOINT)
    with pytest.raises(LearnError, match="is no checkpoint of a run; start anew with --force"):
        learn(options(tmp_path, steps=2), resume=True)


@pytest.mark.parametrize("changes", [{"step": "x"}, {"step": -1}, {"seconds": "x"}, {"source": 3}], ids=str)
def test_a_checkpoint_with_parts_of_another_kind_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    learn(options(tmp_path, steps=1))
    file = tmp_path / "masks.learn" / CHECKPOINT
    torch.save(torch.load(file, weights_only=True) | changes, file)
    with pytest.raises(LearnError, match="is no checkpoint of this run"):
        learn(options(tmp_path, steps=2), resume=True)


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(LearnError, match="--no-gru"):
        dataclasses.replace(options(Path("x")), hypernetwork=False, gru=False)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 2**64}, {"learning_rate": 1e38}, {"weight_decay": 1e300}, {"regulariser_weight": float("inf")}],
    ids=str,
)
def test_numbers_beyond_all_use_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(LearnError, match=next(iter(changes))):
        options(Path("x"), **changes)
