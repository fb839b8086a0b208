"""The folder of a run: its options, its metrics and its latest checkpoint, each written whole or not at all."""

import json
import math
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dispc.learn.options import RunOptions
from dispc.support.errors import LearnError, first_line
from dispc.support.files import whole, write_json, write_text

CHECKPOINT, METRICS, OPTIONS, BOARD = "checkpoint.pt", "metrics.jsonl", "options.json", "tensorboard"
PICTURES = LEARNING, WIDTHS, RECOVERY = "learning.png", "widths.png", "recovery.png"
FORMAT_VERSION = 2


class RunFolder:
    """`options.folder`, which nothing touches before `prepare`."""

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.path = options.folder
        self.checkpoint, self.metrics = self.path / CHECKPOINT, self.path / METRICS

    def check(self, *, resume: bool, force: bool) -> None:
        """Raise DispcError unless the run can `resume`, or start without losing an earlier one (or with `force`)."""
        recorded = self.path / OPTIONS
        self.options.check_output(force=True)
        if resume and recorded.is_file():
            self.options.check_same(_read_options(recorded))
        elif resume and self.checkpoint.exists():
            raise LearnError(f"{recorded}: is missing, and with it what the checkpoint is of; start anew with --force")
        elif not resume and not force and self.path.exists():
            raise LearnError(f"{self.path}: exists; go on with --resume, or replace it with --force")
        else:
            self.options.check_output(force=force)

    def prepare(self, *, resume: bool) -> None:
        """Make the folder, remove an earlier run unless it is resumed, and write down the options.

        Nothing is removed but what a run writes: the folder may hold other things, or be a link.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for partial in self.path.glob("*.partial"):  # of a run that was killed while it wrote
            partial.unlink()
        if not resume:
            for name in (CHECKPOINT, METRICS, OPTIONS, *PICTURES):
                (self.path / name).unlink(missing_ok=True)
            if (self.path / BOARD).exists():
                shutil.rmtree(self.path / BOARD)
        write_json(self.path / OPTIONS, self.options.as_dict())

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
        if not self.checkpoint.is_file():
            return None
        try:
            state: Any = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise LearnError(f"{self.checkpoint}: is no checkpoint of a run ({first_line(error)})") from error
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
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_text(self.metrics, "".join(line for line in lines if _step_of(line) <= step))


def _read_options(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LearnError(f"{path}: cannot be read ({first_line(error)}); start anew with --force") from error
    if not isinstance(content, dict):
        raise LearnError(f"{path}: does not hold the options of a run; start anew with --force")
    return content


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
