"""One run of recovery: the masked model is trained step by step, judged by held-out text, and saved.

Data of a step are a function of the seed and the step's number alone: that is all the random state there is.
"""

import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from dispc.learn.adapter import add_adapters, trained_parameters
from dispc.learn.distributed import Processes, fill, gathered, like
from dispc.learn.folder import RunFolder
from dispc.learn.objective import checkpoint_block, divergence, next_token_loss
from dispc.learn.recovery_options import LOSSES, RecoverOptions
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.text import Tokens, batch
from dispc.reference.masked import apply_masks, load_reference, zero_outside
from dispc.support.dtypes import DTYPES
from dispc.support.errors import Interrupted, LearnError, first_line
from dispc.support.signals import note_signals

CLIP = 1.0
"""Largest norm of a step's gradient."""
Progress = Callable[[Mapping[str, float], int], None]
"""Called after every step with its record (step, loss, distil, text, tokens_per_second) and the steps in all."""


@dataclass(frozen=True)
class Recovered:
    """The result of a run. Losses are on held-out text, in nats; `ended` is the reason of an early end."""

    begin: dict[str, float]
    best: dict[str, float]
    best_step: int
    steps: int
    ended: str

    @property
    def gained(self) -> bool:
        return self.best_step > 0


class Recovery:
    """One run: the masked model and its teacher, the optimiser, the step it is at, and the best weights so far."""

    def __init__(
        self,
        options: RecoverOptions,
        checkpoint: Checkpoint,
        teacher: Checkpoint,
        masks: Masks,
        processes: Processes,
        inputs: dict[str, str],
    ) -> None:
        self.options, self.processes, self.inputs = options, processes, inputs
        self.folder = RunFolder(options)
        config, family = checkpoint.config, checkpoint.config.family
        assert options.precision is not None, "options are settled before a run has them"
        precision = DTYPES[options.precision].torch
        frozen = precision if processes.device.type == "cuda" else torch.float32
        self.autocast = None if precision is torch.float32 else precision
        self.weights = LOSSES[options.loss]
        self.teacher = load_reference(teacher, None, frozen).requires_grad_(False)
        self.model = load_reference(checkpoint, None, frozen if options.lora else torch.float32)
        self.model.requires_grad_(False)
        zero_outside(self.model, family, masks)
        self.wrapped = add_adapters(self.model, config, options.lora, options.seed) if options.lora else None
        if not options.lora:
            for index in range(config.num_hidden_layers):
                self.model.get_submodule(family.block(index)).requires_grad_(True)
        for one, placed in ((self.teacher, teacher.config), (self.model, config)):
            processes.place(one, placed)
        apply_masks(self.model, family, masks)
        if options.activation_checkpointing:
            for index in range(config.num_hidden_layers):
                checkpoint_block(self.model.get_submodule(family.block(index)))
        self.trained = trained_parameters(self.model)
        self.optimiser = torch.optim.AdamW(
            self.trained.values(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.step, self.seconds, self.taken = 0, 0.0, 0.0
        self.judgements: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.ended = ""
        self.noted: Callable[[], int | None] = lambda: None
        self.stopping = False

    @property
    def best_judgement(self) -> dict[str, float]:
        return min(self.judgements, key=lambda one: one["loss"])  # the first of equal ones

    def run(self, rows: Tokens, held_out: Tokens, progress: Progress) -> None:
        """All remaining steps, with judgements and checkpoints in between.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, at the end of the step; nothing is lost.
        """
        options, main = self.options, self.processes.main
        with ExitStack() as stack:
            log = stack.enter_context(open(self.folder.metrics, "ab", buffering=0)) if main else None
            self.noted = stack.enter_context(note_signals())
            if not self.judgements:
                self._write(log, {"step": 0} | self.judge(held_out))
            while not self.ended and options.done(self.step, self.seconds) < 1.0:
                start = time.perf_counter()
                record = self.advance(batch(rows, self.step, options.batch_size * options.accumulate, options.seed))
                if record is None:
                    self.ended = f"step {self.step + 1}: the loss or its gradient is not a number"
                    break
                seconds = time.perf_counter() - start
                size = options.batch_size * options.accumulate * options.sequence_length
                record["tokens_per_second"] = size / seconds
                over = options.done(self.step, self.seconds) >= 1.0
                if self.step % options.evaluate_every == 0 or over:
                    record |= self.judge(held_out)
                self.taken += time.perf_counter() - start
                self._write(log, record)
                if main:
                    progress(record, options.steps)
                if self.stopping or self.step % options.checkpoint_every == 0 or over:
                    self.save()
                if self.stopping and not over:
                    message = f"stopped after step {self.step}; go on with --resume" if main else ""
                    raise Interrupted(message, self.noted() or signal.SIGTERM)

    def advance(self, rows: Tokens) -> dict[str, float] | None:
        """One step on all processes' sequences rows [B,S]; its record, None where it has no finite gradient."""
        options, size = self.options, self.options.batch_size
        self.optimiser.zero_grad(set_to_none=True)
        losses = torch.zeros(2, device=self.processes.device)
        for start in range(0, len(rows), size):
            parts = self.losses(self.processes.share(rows[start : start + size]))
            self.total(parts / options.accumulate).backward()  # type: ignore[no-untyped-call]
            losses += parts.detach() / options.accumulate
        noted = torch.tensor([float(self.noted() is not None), self.taken], device=losses.device)
        norm = gathered(nn.utils.clip_grad_norm_(self.trained.values(), CLIP))
        distil, text, stopping, self.seconds = self.processes.mean(torch.cat([losses, noted])).tolist()
        self.stopping = stopping > 0
        loss = self.weights[0] * distil + self.weights[1] * text
        if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
            return None
        for group in self.optimiser.param_groups:
            group["lr"] = options.rate(self.step, self.seconds)
        self.optimiser.step()
        self.step += 1
        return {"step": self.step, "loss": loss, "distil": distil, "text": text}

    def losses(self, ids: Tensor) -> Tensor:
        """Divergence from the teacher and the text's cross entropy on ids [B,S], float32 [2]; unused ones are zero."""
        with torch.autocast(ids.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits = self.model(input_ids=ids, use_cache=False).logits
            with torch.no_grad():
                taught = self.teacher(input_ids=ids, use_cache=False).logits
        judged = not torch.is_grad_enabled()
        distil = divergence(logits, taught) if self.weights[0] or judged else logits.new_zeros(())
        text = next_token_loss(logits, ids) if self.weights[1] or judged else logits.new_zeros(())
        return torch.stack([distil.float(), text.float()])

    def total(self, losses: Tensor) -> Tensor:
        """The loss that is minimised, of `losses`."""
        return (losses * losses.new_tensor(self.weights)).sum()

    @torch.no_grad()
    def judge(self, held_out: Tokens) -> dict[str, float]:
        """Judge the weights as they are by the held-out windows, and keep them where they are the best so far."""
        count = self.processes.count
        rows = -(-len(held_out) // count) * count  # some twice, so that all processes have equally many
        mine = self.processes.share(np.resize(held_out, (rows, held_out.shape[1])))
        size = max(1, self.options.batch_size // count)
        sums = torch.zeros(2, device=mine.device)
        for start in range(0, len(mine), size):
            piece = mine[start : start + size]
            sums += self.losses(piece) * len(piece)
        distil, text = self.processes.mean(sums / len(mine)).tolist()
        loss = self.weights[0] * distil + self.weights[1] * text
        found = {"step": self.step, "loss": loss, "distil": distil, "text": text}
        if not self.judgements or loss < self.best_judgement["loss"]:
            self.best = gathered(self.trained)
        self.judgements.append(found)
        if self.step - self.best_judgement["step"] >= self.options.patience * self.options.evaluate_every:
            self.ended = f"no gain on held-out text for {self.options.patience} judgements"
        return {"held_out_loss": loss, "held_out_distil": distil, "held_out_text": text}

    def outcome(self) -> Recovered:
        """The result of the run."""
        best = dict(self.best_judgement)
        return Recovered(dict(self.judgements[0]), best, int(best["step"]), self.step, self.ended)

    def go_to_best(self) -> None:
        """Give the model the best weights."""
        for name, parameter in self.trained.items():
            fill(parameter, self.best[name])

    def save(self) -> None:
        """Write the checkpoint, on the main process."""
        optimiser = gathered(self.optimiser.state_dict())
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "judgements": self.judgements,
            "best": self.best,
            "ended": self.ended,
            "trained": gathered(self.trained),
            "optimiser": optimiser,
        }
        if self.processes.main:
            self.folder.save(state, self.inputs)

    def restore(self) -> None:
        """Resume from the checkpoint, or start at the beginning where there is none.

        Raises:
            LearnError: when it is damaged, of another run, or not the same for every process.
        """
        state = self.folder.load(torch.device("cpu"), self.inputs)
        if state is not None:
            try:
                self._restore(state)
            except (RuntimeError, KeyError, ValueError, TypeError) as error:
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

    def _restore(self, state: dict[str, Any]) -> None:
        for name, parameter in self.trained.items():
            fill(parameter, state["trained"][name])
        optimiser = state["optimiser"]
        for number, parameter in enumerate(self.trained.values()):
            moments = optimiser["state"][number]
            optimiser["state"][number] = {
                key: like(parameter, value) if value.shape == parameter.shape else value
                for key, value in moments.items()
            }
        self.optimiser.load_state_dict(optimiser)
        self.step, self.judgements, self.best = state["step"], state["judgements"], state["best"]
        self.seconds = self.taken = state["seconds"]
        self.ended = state["ended"]

    def _write(self, file: BinaryIO | None, record: dict[str, float]) -> None:
        if file is None:
            return
        try:
            file.write(f"{json.dumps(record)}\n".encode())
        except OSError as error:
            raise LearnError(f"{self.folder.metrics}: cannot be written ({error.strerror})") from error
