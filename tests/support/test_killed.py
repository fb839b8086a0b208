"""kill -9 while an artifact is written: whenever it comes, a whole one is there, and the next start clears up."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
from command import fingerprint
from sets import half

from dispc.compiler import CompileOptions, compile_model
from dispc.manifest import foreign_to_artifact
from dispc.support import directories
from dispc.support.directories import exchange, recover, staged_directory
from dispc.support.errors import ArtifactError

RANDOM_KILLS = 50
MUTATING = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "dispc.exchange")
"""What Python reports (audit events) when a process changes files, beside opening them to write."""


def compile_into(place: Path, seed: int) -> None:
    options = CompileOptions(
        model=harness.checkpoint("llama").directory,
        masks=place / f"{seed}.safetensors",
        output=place / "out",
        target="onnx-cpu",
        force=True,
        validate=False,
    )
    compile_model(options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two mask files, and the artifact of the first in `out`."""
    folder = tmp_path_factory.mktemp("killed")
    for seed in (1, 2):
        half("llama", seed).save(folder / f"{seed}.safetensors", harness.checkpoint("llama").config)
    compile_into(folder, 1)
    return folder


def in_child(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Do `work` in a forked process, killed after so many seconds; what it ended by, as a negative signal number."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(number: int, place: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that kills the process before its change `number` of files in `place` (never with 0)."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        path = str(arguments[0]) if arguments else ""
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        relative = event in ("os.remove", "os.rmdir") and not path.startswith("/")  # rmtree, by descriptors
        if (path.startswith(f"{place}/") and (event in MUTATING or writes)) or relative:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == 0:
                (place.with_suffix(".count")).write_text(str(seen))

    return hook


def write_small(out: Path, content: str) -> None:
    """An artifact of a few files, which takes no time to write."""
    with staged_directory(out, force=True) as stage:
        for name in ("model.onnx", "config.json", "dispc.json"):
            (stage / name).write_text(f'{{"dispc": "{content}"}}')


def small(place: Path) -> Path:
    place.mkdir()
    write_small(place / "out", "old")
    return place / "out"


def whole(out: Path) -> str:
    """Which artifact is in `out`; fails when it is not all of one."""
    contents = {file.read_text() for file in out.iterdir()}
    assert len(contents) == 1 and len(list(out.iterdir())) == 3
    return contents.pop()


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_every_change_of_a_file_loses_nothing(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(first: Path, second: Path) -> bool:
        sys.audit("dispc.exchange", str(first), str(second))
        return exchanges and exchange(first, second)

    monkeypatch.setattr(directories, "exchange", noted)

    def work(number: int, place: Path) -> Callable[[], None]:
        def do() -> None:
            sys.addaudithook(kill_at(number, place))
            write_small(place / "out", "new")

        return do

    counting = small(tmp_path / "counting").parent
    assert in_child(work(0, counting)) == 0
    changes = int(counting.with_suffix(".count").read_text())
    assert changes >= 9
    found = []
    for number in range(1, changes + 1):
        out = small(tmp_path / str(number))
        assert in_child(work(number, out.parent)) == -signal.SIGKILL
        recover(out)
        assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing is left behind
        found.append(whole(out))
    assert {"old", "new"} == {"old" if "old" in content else "new" for content in found}
    print(f"{changes} kills, one before every change of a file: 0 artifacts lost")


def lasting(out: Path) -> dict[str, str]:
    """The digests of an artifact's files, those that hold times left out."""
    return {name: digest for name, digest in fingerprint(out).items() if name not in ("dispc.json", "README.md")}


def test_random_kills_of_a_compilation_lose_nothing(place: Path) -> None:
    out, known = place / "out", []
    for seed in (1, 2):
        start = time.monotonic()
        assert in_child(partial(compile_into, place, seed)) == 0
        duration = time.monotonic() - start
        known.append(lasting(out))
    assert known[0] != known[1]
    rng, killed = random.Random(0), 0
    for number in range(RANDOM_KILLS):
        killed += in_child(partial(compile_into, place, 1 + number % 2), rng.uniform(0, duration)) == -signal.SIGKILL
        recover(out)
        assert lasting(out) in known and foreign_to_artifact(out) is None
        assert sorted(path.name for path in place.iterdir()) == ["1.safetensors", "2.safetensors", "out"]
    assert killed > RANDOM_KILLS / 4
    print(f"{RANDOM_KILLS} compilations killed at random, {killed} before they were done: 0 artifacts lost")


def test_what_another_process_is_writing_is_not_cleared_up(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out", force=False) as stage:
        (stage / "dispc.json").write_text('{"dispc": "mine"}')
        assert in_child(lambda: recover(tmp_path / "out")) == 0
        assert (stage / "dispc.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("out_exists", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        ".out.keep.old",
        ".out.draft.partial",
        ".out.mydrafts.partial",
        ".out.dispc-mydrafts.old",  # named like ours, but not an artifact
        ".out.v2.dispc-abcd_123.old",  # of another output, "out.v2"
        ".out.v2.dispc-abcd_123.partial",
        ".oXt.dispc-abcd_123.partial",  # of `o?t`, were the name a pattern
    ],
)
def test_hidden_directories_of_others_are_not_cleared_up(name: str, out_exists: bool, tmp_path: Path) -> None:
    out = tmp_path / ("o?t" if "X" in name else "out")
    if out_exists:
        write_small(out, "old")
    (tmp_path / name).mkdir()
    content = '{"dispc": "another"}' if "v2" in name else "mine"
    (tmp_path / name / ("dispc.json" if "v2" in name else "thesis.tex")).write_text(content)
    before = fingerprint(tmp_path / name)
    write_small(out, "new")
    assert fingerprint(tmp_path / name) == before and "new" in whole(out)


def test_directories_change_places_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system has no renameat2")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert not exchange(tmp_path / "a", tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{}", "[]", "nonsense", '{"name": "another tool"}', '{"dispc": 3}'])
def test_a_foreign_file_of_the_same_name_does_not_make_an_artifact(content: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "dispc.json").write_text(content)
    before = fingerprint(tmp_path)
    with pytest.raises(ArtifactError, match=r"holds no dispc.json of dispc"):
        write_small(out, "new")
    assert fingerprint(tmp_path) == before


def test_a_folder_under_the_name_of_a_file_and_other_masks_are_not_replaced(place: Path) -> None:
    """They are somebody's, whatever they are called."""
    for name in ("LICENSE-drafts", "vocab.json"):
        (place / "out" / name).mkdir()
        with pytest.raises(ArtifactError, match=f"holds {name}, which is not of the artifact"):
            compile_into(place, 1)
        (place / "out" / name).rmdir()
    own = (place / "out" / "masks.safetensors").read_bytes()
    half("llama", 3).save(place / "out" / "masks.safetensors", harness.checkpoint("llama").config)
    with pytest.raises(ArtifactError, match="holds other masks than those"):
        compile_into(place, 1)
    (place / "out" / "masks.safetensors").write_bytes(own)


def test_an_artifact_with_a_file_of_somebody_else_in_it_is_not_replaced(place: Path) -> None:
    (place / "out" / "thesis.tex").write_text("mine")
    try:
        with pytest.raises(ArtifactError, match=r"holds thesis.tex, which is not of the artifact"):
            compile_into(place, 1)
        assert (place / "out" / "thesis.tex").read_text() == "mine"
    finally:
        (place / "out" / "thesis.tex").unlink()
