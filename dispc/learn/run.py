"""What every run through a text is: steps that are logged, saved, stopped by a signal, and resumed.

Data of a step are a function of the seed and the step's number alone, so that the step is all there is to resume from.
"""

import json
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from dispc.learn.distributed import Processes
from dispc.learn.folder import RunFolder
from dispc.learn.options import RunOptions
from dispc.model.checkpoint import Checkpoint
from dispc.model.text import TextTokens, batch
from dispc.support.dtypes import DTYPES
from dispc.support.errors import Interrupted, LearnError, first_line
from dispc.support.signals import note_signals

Progress = Callable[[Mapping[str, float], int], None]
"""Called after every step with its record (step, losses, tokens_per_second) and the steps in all."""
Write = Callable[[Mapping[str, float]], None]
Options = TypeVar("Options", bound=RunOptions)


def begin(options: Options, checkpoint: Checkpoint, *, resume: bool, force: bool) -> tuple[Options, Processes]:
    """Join the processes of a run; its options as they are on their device. Nothing is written or removed.

    `resume` continues from the checkpoint in the run's folder, or starts at the beginning where there is none; without
    it, an earlier run there is kept unless `force`.

    Raises:
        DispcError: when the run cannot start.
    """
    if options.sequence_length > checkpoint.config.max_positions:
        raise LearnError(
            f"sequence_length is {options.sequence_length}, {options.model} has {checkpoint.config.max_positions} "
            "positions; choose --sequence-length"
        )
    processes = Processes.join(options.device)
    if options.batch_size % processes.count:
        raise LearnError(
            f"batch_size {options.batch_size} cannot be shared by {processes.count} processes; "
            f"give --batch-size {processes.count}, or a multiple of it"
        )
    options = options.settled(processes.device)
    if processes.main:
        RunFolder(options).check(resume=resume, force=force)
    return options, processes


class Run(ABC, Generic[Options]):
    """The step a run is at, its folder, and the loop. A kind of run says what a step is, and what it needs to resume.

    `inputs` are digests of what is learned on, by name: resuming requires the same inputs. `seconds` is how long all
    steps took as the processes agree, `taken` how long they took here.
    """

    optimiser: torch.optim.Optimizer

    def __init__(self, options: Options, processes: Processes, inputs: Mapping[str, str]) -> None:
        self.options, self.processes, self.inputs = options, processes, inputs
        self.folder = RunFolder(options)
        self.step, self.seconds, self.taken = 0, 0.0, 0.0
        self.ended = ""
        """Why the run ended early."""
        self.noted: Callable[[], int | None] = lambda: None
        self.stopping = False
        assert options.precision is not None, "options are settled before a run has them"
        precision = DTYPES[options.precision].torch
        self.autocast = None if precision is torch.float32 else precision
        self.frozen = precision if processes.device.type == "cuda" else torch.float32
        """The dtype of weights that are not trained."""

    @abstractmethod
    def advance(self, rows: TextTokens) -> dict[str, float] | None:
        """One step on all processes' sequences rows [B,S]; its record, None where the run `ended` in it."""

    def judged(self) -> dict[str, float]:
        """Figures of what the run has made by this step; empty where nobody looks."""
        return {}

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the step; all processes must call it together."""

    @abstractmethod
    def set_state(self, state: dict[str, Any]) -> None:
        """Go back to what `state` returned; its tensors are on the CPU."""

    @property
    def over(self) -> bool:
        return self.options.done(self.step, self.seconds) >= 1.0

    def start(self, *, resume: bool) -> None:
        """Replace an earlier run, or go on from its checkpoint.

        Raises:
            LearnError: when the checkpoint is damaged, of another run, or not the same for every process.
        """
        if resume:
            self._restore()
        if self.processes.main:
            self.folder.prepare(resume=resume)
            self.folder.cut_metrics(self.step)
        self.processes.wait()

    def run(self, rows: TextTokens, progress: Progress) -> None:
        """All remaining steps, with a checkpoint every so many, at the end, and where a signal ends the run.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, at the end of the step; nothing is lost.
            LearnError: when a step fails.
        """
        try:
            with self._log() as write, note_signals() as self.noted:
                if self.step == 0 and (judged := self.judged()):
                    write({"step": 0} | judged)
                while not self.ended and not self.over:
                    self._step(rows, write, progress)
        except KeyboardInterrupt:  # the second one, which does not wait for the step
            message = f"interrupted in step {self.step + 1}; go on from the latest checkpoint with --resume"
            raise Interrupted(message, signal.SIGINT) from None

    def _step(self, rows: TextTokens, write: Write, progress: Progress) -> None:
        options, main = self.options, self.processes.main
        start = time.perf_counter()
        record = self.advance(batch(rows, self.step, options.sequences, options.seed))
        if record is None:
            return
        record["tokens_per_second"] = options.sequences * options.sequence_length / (time.perf_counter() - start)
        record |= self.judged()
        self.taken += time.perf_counter() - start
        write(record)
        if main:
            progress(record, options.steps)
        if self.stopping or self.over or self.step % options.checkpoint_every == 0:
            self._save()
        if self.stopping and not self.over:
            message = f"stopped after step {self.step}; go on with --resume" if main else ""
            raise Interrupted(message, self.noted() or signal.SIGTERM)

    def to_agree_on(self) -> list[float]:
        """What `agree_on` takes when it is averaged over the processes: all of them stop after the same step."""
        return [self.taken, float(self.noted() is not None)]

    def agree_on(self, seconds: float, noted: float) -> None:
        self.seconds, self.stopping = seconds, noted > 0

    def update(self) -> None:
        """The end of a step: its gradient changes the weights."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.options.rate(self.step, self.seconds)
        self.optimiser.step()
        self.step += 1

    @contextmanager
    def _log(self) -> Iterator[Write]:
        """What adds a record to the metrics, on the main process."""
        if not self.processes.main:
            yield lambda record: None
            return
        with open(self.folder.metrics, "ab", buffering=0) as file:

            def write(record: Mapping[str, float]) -> None:
                try:
                    file.write(f"{json.dumps(record)}\n".encode())
                except OSError as error:
                    raise LearnError(f"{self.folder.metrics}: cannot be written ({error.strerror})") from error

            yield write

    def _save(self) -> None:
        state = {"step": self.step, "seconds": self.seconds} | self.state()
        if self.processes.main:
            self.folder.save(state, self.inputs)

    def _restore(self) -> None:
        state = self.folder.load(self.inputs)
        if state is not None:
            try:
                step, seconds = state["step"], state.get("seconds", 0.0)
                if type(step) is not int or step < 0 or type(seconds) is not float or not seconds >= 0.0:
                    raise ValueError("its step or its time is no number")
                self.set_state(state)
                self.step, self.seconds, self.taken = step, seconds, seconds
            except Exception as error:  # whatever the code above, torch's with it, runs into where parts are missing
                message = f"{self.folder.checkpoint}: is no checkpoint of this run ({first_line(error)})"
                raise LearnError(message) from error
        if not self.processes.agree(self.step):
            raise LearnError(
                f"{self.folder.checkpoint}: not every process reads the same; "
                "the run's folder must be on a disk that all nodes share"
            )
        if self.step > self.options.steps:
            raise LearnError(
                f"{self.folder.checkpoint}: is of step {self.step}, steps is {self.options.steps}; "
                f"resume with --steps {self.step} or more"
            )
