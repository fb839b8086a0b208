"""A place to run the command line in: a model with masks, an older artifact of it, and room for a new one."""

from dataclasses import dataclass
from pathlib import Path

import command
import tiny
from command import assert_refused

from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Desk:
    """A model with masks, an older artifact of it, and a free place for a new one."""

    place: Path
    model: Path
    older: Path
    new: Path

    def refuses(self, *options: object, says: tuple[str, ...] = (), code: int = 2) -> None:
        """`dispc compile` is refused alike when the artifact is a new one and when it would replace the older one."""
        for output in (["-o", self.new], ["-o", self.older, "--force"]):
            assert_refused(self.place, "compile", self.model, *target(options), *output, *options, says=says, code=code)

    def compiles(self, *options: object) -> Path:
        outcome = command.run("compile", self.model, *target(options), "-o", self.new, "--no-validate", *options)
        assert outcome.code == 0, outcome
        return self.new


def target(options: tuple[object, ...]) -> tuple[str, ...]:
    return () if "--target" in options else ("--target", "onnx-cpu")


def furnish(place: Path) -> Path:
    """A llama with masks in `place`/model, and its artifact in `place`/older."""
    model = tiny.make_model("llama", place / "model")
    config = Checkpoint(model).config
    Masks.random(config, 0.5, 1).save(model / "masks.safetensors", config)
    outcome = command.run("compile", model, "-t", "onnx-cpu", "-o", place / "older", "--no-validate")
    assert outcome.code == 0, outcome
    return place
