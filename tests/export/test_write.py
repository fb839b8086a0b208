"""Writing: an artifact appears whole or not at all, and the older one stays until then."""

import errno
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import onnx
import pytest
from command import fingerprint
from hypothesis import given
from hypothesis import strategies as st
from writing import fill, lazy, model_of, older_artifact

from dispc.export.write import INLINE_BYTES, check_file, save_model
from dispc.masks import Masks
from dispc.support.directories import check_output, staged_directory
from dispc.support.errors import ArtifactError, CheckpointError

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


# The directory


@pytest.mark.parametrize("older", [False, True])
def test_what_was_written_appears_under_the_name_and_nothing_else(older: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if older:
        older_artifact(out)
    with staged_directory(out, force=older) as stage:
        fill(stage)
        assert stage.parent == out.parent  # one file system: the rename is atomic
        assert out.exists() == older
    assert sorted(fingerprint(tmp_path)) == ["out", "out/dispc.json", "out/sub", "out/sub/file"]
    assert "newer" in (out / "dispc.json").read_text()


def test_missing_parents_are_made_and_a_relative_path_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged_directory(Path("a/b/out"), force=False) as stage:
        fill(stage)
    assert (tmp_path / "a" / "b" / "out" / "dispc.json").is_file()


def test_an_artifact_gets_the_permissions_of_an_ordinary_directory(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out", force=False) as stage:
        fill(stage)
    (tmp_path / "ordinary").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), ValueError("bug"), ArtifactError("no")])
def test_an_error_in_the_body_passes_through_and_leaves_everything_as_it_was(
    error: BaseException, older: bool, tmp_path: Path
) -> None:
    if older:
        older_artifact(tmp_path / "out")
    before = fingerprint(tmp_path)
    with pytest.raises(type(error)), staged_directory(tmp_path / "out", force=older) as stage:
        fill(stage)
        raise error
    assert fingerprint(tmp_path) == before


def test_folders_that_were_made_for_nothing_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError), staged_directory(tmp_path / "deep" / "deeper" / "out", force=False):
        raise ValueError
    assert not any(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    with staged_directory(Path("new/../out"), force=False) as stage:
        fill(stage)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_system_error_in_the_body_names_the_file_and_leaves_everything_as_it_was(tmp_path: Path) -> None:
    older_artifact(tmp_path / "out")
    before = fingerprint(tmp_path)
    with pytest.raises(ArtifactError, match="No space left"), staged_directory(tmp_path / "out", force=True) as stage:
        fill(stage)
        raise NO_SPACE
    with pytest.raises(ArtifactError, match="nowhere"), staged_directory(tmp_path / "out", force=True) as stage:
        (stage / "nowhere" / "file").write_text("")
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NO_SPACE])
@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("done", [False, True])
def test_a_failure_between_the_renames_brings_the_older_artifact_back(
    done: bool, call: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rename of the exchange in turn fails, before it happened or after: one whole artifact is there."""
    older_artifact(tmp_path / "out")
    before, rename, calls = fingerprint(tmp_path), Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) != call + 1:
            return rename(self, target)
        if done:
            rename(self, target)
        raise error

    monkeypatch.setattr(Path, "rename", failing)
    monkeypatch.setattr("dispc.support.directories.exchange", lambda first, second: False)
    with pytest.raises((KeyboardInterrupt, ArtifactError)), staged_directory(tmp_path / "out", force=True) as stage:
        fill(stage)
    monkeypatch.undo()
    after = fingerprint(tmp_path)
    if (call, done) == (1, True):  # the newer one was in place already
        assert sorted(after) == ["out", "out/dispc.json", "out/sub", "out/sub/file"]
    else:
        assert after == before


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_foreign(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def make_link(path: Path) -> None:
    path.symlink_to(older_artifact(path.with_name("elsewhere")))


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("make", [make_file, make_foreign, make_link, make_dangling_link, older_artifact])
@pytest.mark.parametrize("force", [False, True])
def test_only_an_artifact_is_replaced_and_only_by_force(
    make: Callable[[Path], Any], force: bool, tmp_path: Path
) -> None:
    make(tmp_path / "out")
    before = fingerprint(tmp_path)
    if make is older_artifact and force:
        check_output(tmp_path / "out", force)
        return
    with pytest.raises(
        ArtifactError, match="holds no dispc.json|is a link" if force else "exists already; use --force"
    ):
        check_output(tmp_path / "out", force)
    with pytest.raises(ArtifactError), staged_directory(tmp_path / "out", force):
        pytest.fail("the body must not run")
    assert fingerprint(tmp_path) == before


def test_an_empty_directory_may_be_replaced_by_force(tmp_path: Path) -> None:
    check_output(tmp_path, force=True)
    check_output(tmp_path / "new", force=False)


def test_an_input_that_cannot_be_read_is_not_told_as_one_that_cannot_be_written(tmp_path: Path) -> None:
    """Also where it lies beside the output."""
    unreadable = tmp_path / "model" / "tokenizer.json"
    with pytest.raises(OSError, match="Input/output error") as failure, staged_directory(tmp_path / "out", False):
        raise OSError(errno.EIO, "Input/output error", str(unreadable))
    assert failure.value.filename == str(unreadable)
    assert not list(tmp_path.iterdir())


def test_a_copy_that_fills_the_disk_names_what_it_writes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ArtifactError, match=r"/out/x: cannot be written"), staged_directory(out, False) as stage:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "model/x"), None, str(stage / "x"))


def test_a_parent_that_is_a_file_or_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_file(tmp_path / "file")
    with (
        pytest.raises(ArtifactError, match=r"file/out: cannot be written .*file is not a directory"),
        staged_directory(tmp_path / "file/out", False),
    ):
        pytest.fail("the body must not run")

    def denied(*args: Any, **options: Any) -> str:  # as root no directory is read-only
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr("dispc.support.directories.mkdtemp", denied)
    with pytest.raises(ArtifactError, match="Permission denied"), staged_directory(tmp_path / "far" / "out", False):
        pytest.fail("the body must not run")
    assert sorted(fingerprint(tmp_path)) == ["file"]


# The model


@given(st.lists(st.integers(1, 600), min_size=1, max_size=5), st.booleans())
def test_a_saved_model_holds_every_weight_bit_for_bit(widths: list[int], through_checkpoint: bool) -> None:
    directory = harness.scratch() / "saved"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    rng = np.random.default_rng(len(widths))
    values = {f"w{i}": rng.normal(size=(1, width)).astype(np.float32) for i, width in enumerate(widths)}
    save_model(model_of({n: lazy(v, n) if through_checkpoint else v for n, v in values.items()}), directory / "m.onnx")
    assert {file.name for file in directory.iterdir()} <= {"m.onnx", "m.onnx.data"}
    loaded = {tensor.name: tensor for tensor in onnx.load(directory / "m.onnx").graph.initializer}
    for name, value in values.items():
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(loaded[name]), value)


def test_small_tensors_stay_in_the_model_file_and_large_ones_do_not(tmp_path: Path) -> None:
    count = INLINE_BYTES // 4
    values = {"small": np.ones((1, count - 1), np.float32), "large": np.ones((1, count + 1), np.float32)}
    save_model(model_of(values), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    stored = {tensor.name: bool(tensor.external_data) for tensor in graph.initializer}
    assert stored == {"small": False, "large": True}


def test_progress_ends_at_the_whole_and_never_goes_back(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    values = {f"w{i}": np.ones((1, 500 * (i + 1)), np.float32) for i in range(6)}
    save_model(model_of(values), tmp_path / "model.onnx", lambda name, done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(value.nbytes for value in values.values())


@pytest.mark.parametrize("width", [3, 5000])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named_whether_it_is_stored_inline_or_not(
    width: int, bad: float, tmp_path: Path
) -> None:
    values = np.ones((1, width), np.float32)
    values[0, -1] = bad
    with pytest.raises(CheckpointError, match=r"shard\.safetensors: tensor w holds NaN or infinity"):
        save_model(model_of({"w": lazy(values)}), tmp_path / "model.onnx")


@pytest.mark.parametrize("width", [3, 5000])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupt_while_a_weight_is_made_is_not_swallowed(error: BaseException, width: int, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        save_model(model_of({"w": lazy(np.ones((1, width), np.float32), fail=error)}), tmp_path / "model.onnx")


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(100, 90, 10))
    with pytest.raises(OSError, match=r"the disk is too full: 0\.0 MiB needed, 0\.0 MiB free"):
        save_model(model_of({"w": np.ones((1, 5000), np.float32)}), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [0, 100, 10_000])
def test_a_file_system_that_fails_while_writing_is_reported_and_leaves_nothing(room: int, tmp_path: Path) -> None:
    """The system refuses files larger than `room`, as a full disk would: too small for the graph, or the weights."""
    before = fingerprint(tmp_path)
    with (
        pytest.raises(ArtifactError, match=r"/out\S*: cannot be written .*(File too large|is the disk full)"),
        staged_directory(tmp_path / "out", force=False) as stage,
    ):
        model = model_of({"w": np.ones((1, 5000), np.float32)})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            save_model(model, stage / "model.onnx")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fingerprint(tmp_path) == before


def test_the_checker_accepts_a_good_file_and_refuses_a_wrong_one(tmp_path: Path) -> None:
    save_model(model_of({"w": np.ones((1, 5000), np.float32)}), tmp_path / "model.onnx")
    check_file(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    model.graph.node[0].input[1] = "nothing"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match=r"onnx\.checker refuses") as refusal:
        check_file(tmp_path / "model.onnx")
    assert len(str(refusal.value).splitlines()) == 1


def test_writing_the_same_graph_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        masks = Masks.random(harness.checkpoint("llama").config, 0.5, 3)
        save_model(harness.rewritten("llama", masks), tmp_path / name / "model.onnx")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
