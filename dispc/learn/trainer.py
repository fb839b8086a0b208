"""The learning loop: sample gates, run the frozen model through them, train the hypernetwork, save and resume.

Noise and data of a step are functions of the seed and the step's number alone: that is all the random state there is.
"""

import dataclasses
import hashlib
import json
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from dispc.learn.budget import block_budget, budget_facts, check_fits, final_sets, kept_parameters, regulariser
from dispc.learn.distributed import Processes
from dispc.learn.estimator import ESTIMATORS
from dispc.learn.folder import BOARD, RunFolder
from dispc.learn.hypernetwork import FreeLatents, HyperNetwork, Layout
from dispc.learn.objective import GatedModel
from dispc.learn.options import LearnOptions
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.published import open_checkpoint
from dispc.model.text import Tokens, batch, load_tokens, source_name, windows
from dispc.reference.masked import load_reference
from dispc.support.dtypes import DTYPES
from dispc.support.errors import Interrupted, LearnError, first_line
from dispc.support.extras import need
from dispc.support.signals import note_signals

Progress = Callable[[dict[str, float], int], None]
"""Called after every step with its record (step, loss, regulariser, pruned, tokens_per_second) and the steps in all."""


def learn(
    options: LearnOptions, progress: Progress = lambda record, steps: None, *, resume: bool = False, force: bool = False
) -> tuple[Masks, bool]:
    """Learn masks and write them to `options.output`; the masks, and whether this process is the one that wrote them.

    `resume` continues from the checkpoint in the run's folder, or starts at the beginning where there is none; without
    it, an earlier run there is kept unless `force`. Nothing is written or removed before the run is known to start.

    Raises:
        DispcError: when an input is unusable, the budget cannot be met, or the loss is no number.
        Interrupted: when a signal ended the run, which is saved.
    """
    checkpoint = open_checkpoint(options.model)
    budget = block_budget(checkpoint, options.pruning_ratio, options.ratio_of)
    length = options.sequence_length
    if length > checkpoint.config.max_positions:
        raise LearnError(
            f"sequence_length is {length}, {options.model} has {checkpoint.config.max_positions} positions; "
            "choose --sequence-length"
        )
    processes = Processes.join(options.device)
    options = options.settled(processes.device)
    if options.batch_size % processes.count:
        raise LearnError(
            f"batch_size {options.batch_size} cannot be shared by {processes.count} processes; "
            f"give --batch-size {processes.count}, or a multiple of it"
        )
    if processes.main:
        RunFolder(options).check(resume=resume, force=force)
    if options.tensorboard:
        need("tensorboard", "tensorboard")
    check_fits(checkpoint.config, budget, options.align, constrained=options.constrained)
    tokens = load_tokens(options.data, options.model)
    rows = windows(tokens, length, options.data)
    inputs = {
        "the model's configurations": checkpoint.config_sha256,
        "the model's weights": checkpoint.weights_sha256,
        "the tokens of the texts": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    trainer = Trainer(options, checkpoint, budget, processes, inputs)
    if resume:
        trainer.restore()
        if not processes.agree(trainer.step):
            raise LearnError(
                f"{trainer.folder.checkpoint}: not every process reads the same; "
                "the run's folder must be on a disk that all nodes share"
            )
    if processes.main:  # from here on an earlier run is replaced, or resumed
        trainer.folder.prepare(resume=resume)
        trainer.folder.cut_metrics(trainer.step)
    processes.wait()
    try:
        trainer.run(rows, progress)
    except KeyboardInterrupt:  # the second one, which does not wait for the step
        message = f"interrupted in step {trainer.step + 1}; go on from the latest checkpoint with --resume"
        raise Interrupted(message, signal.SIGINT) from None
    masks = trainer.masks()
    if processes.main:
        if resume and options.output.is_file() and (older := Masks.load(options.output)).sha256() == masks.sha256():
            masks = dataclasses.replace(masks, metadata={**older.metadata, **masks.metadata})  # a recorded perplexity
        masks.save(options.output, checkpoint.config)
    processes.wait()
    return masks, processes.main


class Trainer:
    """One learning run: the gated model, the source of latents, its optimiser, and the step it is at.

    `inputs` are digests of what is learned on, by name: resuming requires the same inputs.
    """

    def __init__(
        self,
        options: LearnOptions,
        checkpoint: Checkpoint,
        budget: int,
        processes: Processes,
        inputs: dict[str, str] | None = None,
    ) -> None:
        self.options, self.checkpoint, self.budget, self.processes = options, checkpoint, budget, processes
        self.config, self.inputs = checkpoint.config, inputs or {}
        self.folder = RunFolder(options)
        self.noted: Callable[[], int | None] = lambda: None
        self.stopping = False
        self.dense = self.config.block_parameters * self.config.num_hidden_layers
        self.step, self.seconds, self.taken = 0, 0.0, 0.0  # seconds: of all steps, as the processes agree
        cuda = processes.device.type == "cuda"
        assert options.precision is not None, "options are settled before a trainer has them"
        precision = DTYPES[options.precision].torch
        model = load_reference(checkpoint, None, precision if cuda else torch.float32)
        self.gated = GatedModel(
            model,
            self.config,
            options.norm_scope,
            autocast=None if precision is torch.float32 else precision,
            checkpointing=options.activation_checkpointing,
        )
        processes.place(model, self.config)
        if options.compile:
            model.compile()
        self.layout = Layout.make(self.config, constrained=options.constrained)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            source = (
                HyperNetwork(self.layout.widths, gru=options.gru)
                if options.hypernetwork
                else FreeLatents(self.layout.widths)
            )
        self.source: nn.Module = source.to(processes.device)
        self.optimiser = torch.optim.AdamW(
            self.source.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )

    def run(self, rows: Tokens, progress: Progress) -> None:
        """All remaining steps, with a checkpoint every so many, at the end, and where a signal ends the run.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, at the end of the step; nothing is lost.
            LearnError: when the loss is no number.
        """
        options, main = self.options, self.processes.main
        with ExitStack() as stack:
            log = stack.enter_context(open(self.folder.metrics, "ab", buffering=0)) if main else None
            board = stack.enter_context(_tensorboard(self.folder, self.step)) if options.tensorboard and main else None
            self.noted = stack.enter_context(note_signals())
            while options.done(self.step, self.seconds) < 1.0:
                start = time.perf_counter()
                record = self.advance(self.processes.share(batch(rows, self.step, options.batch_size, options.seed)))
                seconds = time.perf_counter() - start
                self.taken += seconds
                record["tokens_per_second"] = options.batch_size * options.sequence_length / seconds
                if log:
                    self._log(log, record)
                    progress(record, options.steps)
                if board:
                    for name, value in record.items():
                        board.add_scalar(name, value, self.step)
                over = options.done(self.step, self.seconds) >= 1.0
                if self.stopping or self.step % options.checkpoint_every == 0 or over:
                    self.save()
                if self.stopping and not over:
                    message = f"stopped after step {self.step}; go on with --resume" if main else ""
                    raise Interrupted(message, self.noted() or signal.SIGTERM)

    def advance(self, ids: Tensor) -> dict[str, float]:
        """One step on this process's sequences ids [B,S]; the record of the step.

        Whether a signal has come to any process, and how long the steps took, is agreed on with the gradient, so that
        all stop after the same step.

        Raises:
            LearnError: when the loss or a gradient is no number; the latest checkpoint stays valid.
        """
        options = self.options
        latents = self.layout.expand(self.source())
        gates, counted = ESTIMATORS[options.estimator](latents, self._noise(), options.offset)
        leaf = gates.detach().requires_grad_()  # the model's part of the gradient ends here, and is averaged here
        loss = self.gated.loss(leaf, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        noted = leaf.new_tensor([self.taken, float(self.noted() is not None)])
        figures = self.processes.mean(torch.cat([leaf.grad, loss.detach().to(leaf)[None], noted]))
        gradient, facts = figures[:-3], figures[-3:].tolist()
        mean_loss, self.seconds, self.stopping = facts[0], facts[1], facts[2] > 0
        kept = kept_parameters(counted, self.config)
        penalty = regulariser(kept, self.budget)
        record = {
            "step": self.step + 1,
            "loss": mean_loss,
            "regulariser": float(penalty.detach()),
            "pruned": 1.0 - float(kept.detach()) / self.dense,
        }
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward([gates, options.regulariser_weight * penalty], [gradient, torch.ones_like(penalty)])
        self._check_numbers(figures)
        for group in self.optimiser.param_groups:
            group["lr"] = options.rate(self.step, self.seconds)
        self.optimiser.step()
        self.step += 1
        return record

    def _log(self, file: BinaryIO, record: dict[str, float]) -> None:
        try:
            file.write(f"{json.dumps(record)}\n".encode())
        except OSError as error:
            raise LearnError(f"{self.folder.metrics}: cannot be written ({error.strerror})") from error

    def _check_numbers(self, figures: Tensor) -> None:
        gradients = [parameter.grad for parameter in self.source.parameters() if parameter.grad is not None]
        if bool(torch.isfinite(nn.utils.get_total_norm([figures, *gradients]))):  # one answer from the device
            return
        saved = self.folder.checkpoint
        remedy = f"go back to {saved} with --resume" if saved.exists() else "start again with --resume"
        raise LearnError(
            f"step {self.step + 1}: the loss or its gradient is not a number; "
            f"{remedy} and a --learning-rate below {self.options.learning_rate:g}"
        )

    def masks(self) -> Masks:
        """The final sets at this step; no noise is drawn for them."""
        options = self.options
        with torch.no_grad():
            latents = self.layout.expand(self.source()).float().cpu().numpy()
        groups = self.layout.vectors if options.constrained else None
        masks = final_sets(
            latents, self.config, self.budget, align=options.align, norm_scope=options.norm_scope, groups=groups
        )
        metadata = {
            "method": options.method,
            "data": source_name(options.data),
            "steps": str(self.step),
            "seed": str(options.seed),
            "sequence_length": str(options.sequence_length),
            "batch_size": str(options.batch_size),
            "learning_rate": str(options.learning_rate),
            "decay": str(options.decay).lower(),
            "offset": str(options.offset),
            "precision": str(options.precision),
            "weight_decay": str(options.weight_decay),
            "regulariser_weight": str(options.regulariser_weight),
            "align": str(options.align),
            "pruning_ratio": str(options.pruning_ratio),
        } | budget_facts(masks, self.checkpoint, options.ratio_of)
        return dataclasses.replace(masks, metadata=metadata)

    def save(self) -> None:
        """Write the checkpoint, on the main process."""
        if self.processes.main:
            self.folder.save(
                {
                    "step": self.step,
                    "seconds": self.seconds,
                    "source": self.source.state_dict(),
                    "optimiser": self.optimiser.state_dict(),
                },
                self.inputs,
            )

    def restore(self) -> None:
        """Resume from the checkpoint, or start at the beginning where there is none.

        Raises:
            LearnError: when it is damaged, or of another run.
        """
        state = self.folder.load(self.processes.device, self.inputs)
        if state is None:
            return
        try:
            self.source.load_state_dict(state["source"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step = state["step"]
            self.seconds = self.taken = state.get("seconds", 0.0)
        except (RuntimeError, KeyError, ValueError) as error:
            raise LearnError(f"{self.folder.checkpoint}: is no checkpoint of this run ({first_line(error)})") from error
        if self.step > self.options.steps:
            raise LearnError(
                f"{self.folder.checkpoint}: is of step {self.step}, steps is {self.options.steps}; "
                f"resume with --steps {self.step} or more"
            )

    def _noise(self) -> Tensor:
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self.options.seed, self.step)).generate_state(1)[0])
        )
        size = sum(self.layout.widths)
        noise = torch.rand(size, generator=generator)
        return self.layout.expand(noise).to(self.processes.device)


def _tensorboard(folder: RunFolder, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder.path / BOARD), purge_step=step + 1)  # a resumed run repeats later steps
