"""An artifact whose files are links, as in the cache of the hub, is read like any other; none leads out of it."""

import shutil
from pathlib import Path

import command
import onnx
import pytest
from command import assert_refused
from desk import Desk


def linked(artifact: Path, place: Path) -> Path:
    """The layout of the hub's cache: files by content, and a folder of links to them."""
    snapshot, blobs = place / "snapshot", place / "blobs"
    snapshot.mkdir()
    blobs.mkdir()
    for number, file in enumerate(sorted(artifact.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../blobs/{number}")
    return snapshot


def test_an_artifact_of_links_is_judged_like_any_other(desk: Desk, tmp_path: Path) -> None:
    snapshot = linked(desk.older, tmp_path)
    outcome = command.run("validate", snapshot, "-r", desk.model)
    assert outcome.code == 0, outcome
    assert command.run("inspect", snapshot).code == 0


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/passwd", "sub/model.onnx.data", "..", "."])
@pytest.mark.parametrize("name", ["validate", "generate"])
def test_weights_outside_of_the_directory_are_refused(location: str, name: str, desk: Desk) -> None:
    path = desk.older / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    words = ("-r", desk.model) if name == "validate" else ("hello",)
    assert_refused(desk.place, name, desk.older, *words, says=("model.onnx", "outside of its directory"))
