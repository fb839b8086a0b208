"""The folder of a run: its options, its metrics and its latest checkpoint, each written whole or not at all."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dispc.learn.options import RunOptions
from dispc.support.errors import LearnError, first_line
from dispc.support.files import clear_up, whole, write_json, write_text
from dispc.support.inputs import contents, read_object, regular
from dispc.support.torch_files import load_torch

CHECKPOINT, METRICS, OPTIONS, BOARD = "checkpoint.pt", "metrics.jsonl", "options.json", "tensorboard"
PICTURES = LEARNING, WIDTHS, RECOVERY = "learning.png", "widths.png", "recovery.png"
FILES = (OPTIONS, CHECKPOINT, METRICS, *PICTURES)
MOVE = "move its folder away, or choose another -o"
EVENTS = "events.out.tfevents.*"
"""What TensorBoard calls the files that are written for it."""
FORMAT_VERSION = 2
METRICS_BYTES = 2**30
"""A step's line has some 150 bytes; runs of millions of steps come near."""


class RunFolder:
    """`options.folder`, which nothing touches before `prepare`."""

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.path = options.folder
        self.checkpoint, self.metrics = self.path / CHECKPOINT, self.path / METRICS

    def check(self, *, resume: bool, force: bool) -> None:
        """Raise DispcError unless the run can `resume`, or start without losing an earlier one (or with `force`).

        Neither writes into a folder in which somebody else has files of these names.
        """
        self.options.check_output(force=True)
        recorded = self._recorded() if resume or force else None
        if resume and recorded is not None:
            self.options.check_same(recorded)
        elif not resume and not force and self.path.exists():
            raise LearnError(f"{self.path}: exists; go on with --resume, or replace it with --force")
        else:
            self.options.check_output(force=force)

    def prepare(self, *, resume: bool) -> None:
        """Make the folder, remove an earlier run unless it is resumed, and write down the options.

        Nothing is removed but what a run writes: the folder may hold other things, or be a link.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        had_board = (self._recorded() or {}).get("tensorboard") is True
        for name in FILES:
            clear_up(self.path / name)
        if not resume:
            for name in FILES[1:]:  # the options are replaced below: a run killed here is still known as dispc's
                (self.path / name).unlink(missing_ok=True)
            for events in (self.path / BOARD).glob(EVENTS) if had_board else ():
                events.unlink()
        kept = {"tensorboard": True} if resume and had_board else {}
        write_json(self.path / OPTIONS, self.options.as_dict() | kept)

    def _recorded(self) -> dict[str, Any] | None:
        """The options of the run in the folder; None where nothing in it has a name that a run writes to.

        Raises:
            LearnError: when something has, and no run of dispc did it, or it is no regular file.
        """
        older = [self.path / name for name in FILES if (self.path / name).exists()]
        for path in older:
            regular(path, LearnError)
        if self.path / OPTIONS in older:
            return _read_options(self.path / OPTIONS)
        if (self.path / BOARD).exists():
            older.append(self.path / BOARD)
        if older:
            raise LearnError(f"{older[0]}: stands there without the {OPTIONS} of a run of dispc; {MOVE}")
        return None

    def save(self, state: dict[str, Any], inputs: Mapping[str, str]) -> None:
        """Write the checkpoint; the older one stays until this one is whole and on the disk.

        `inputs` names what is learned on, with digests of the content.

        Raises:
            LearnError, OSError: when it cannot be written.
        """
        try:
            with whole(self.checkpoint) as partial, open(partial, "wb") as file:
                torch.save({"version": FORMAT_VERSION, "inputs": dict(inputs)} | state, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:  # torch's zip writer does not report a full disk
            message = f"{self.checkpoint}: cannot be written ({first_line(error)}); is the disk full?"
            raise LearnError(message) from error

    def load(self, inputs: Mapping[str, str]) -> dict[str, Any] | None:
        """What `save` wrote last, with tensors on the CPU; None where it has not yet.

        Raises:
            LearnError: when it is damaged, of another version, or of other inputs.
        """
        if not self.checkpoint.exists():
            return None
        state = load_torch(self.checkpoint, LearnError, "is no checkpoint of a run")
        version, theirs = (state.get("version"), state.get("inputs")) if isinstance(state, dict) else (None, None)
        if not isinstance(theirs, dict):
            raise LearnError(f"{self.checkpoint}: is no checkpoint of a run; start anew with --force")
        if version != FORMAT_VERSION:
            raise LearnError(f"{self.checkpoint}: checkpoint version {version}; this dispc reads {FORMAT_VERSION}")
        for name, digest in inputs.items():
            if theirs.get(name) != digest:
                raise LearnError(f"{self.checkpoint}: is of another run: {name} differ; start anew with --force")
        checkpoint: dict[str, Any] = state
        return checkpoint

    def cut_metrics(self, step: int) -> None:
        """Drop the metrics of steps after `step`, and half a line that a killed run left."""
        if self.metrics.exists():
            lines = _lines(self.metrics)
            write_text(self.metrics, "".join(line for line in lines if _record(line).get("step", math.inf) <= step))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The figures of each step in a `metrics.jsonl`; lines that are not a step's are passed over.

    Raises:
        LearnError, OSError: when the file cannot be read.
    """
    return [record for record in map(_record, _lines(path)) if "step" in record]


def _lines(path: Path) -> list[str]:
    content = contents(path, LearnError, METRICS_BYTES)
    return content.decode("utf-8", errors="replace").splitlines(keepends=True)


def _record(line: str) -> dict[str, float]:
    """The numbers in a line of metrics by name; empty for half a line, and for what is none."""
    try:
        content = json.loads(line)
        return {name: float(value) for name, value in content.items() if isinstance(value, int | float)}
    except (ValueError, AttributeError, OverflowError, RecursionError):
        return {}


def _read_options(path: Path) -> dict[str, Any]:
    """The options of a run.

    Raises:
        LearnError: when that is not what is in the file.
    """
    try:
        content = read_object(path, LearnError)
    except LearnError as error:
        raise LearnError(f"{error}; {MOVE}") from error
    if not {"model", "data", "output", "steps"} <= content.keys():
        raise LearnError(f"{path}: does not hold the options of a run of dispc; {MOVE}")
    return content
