"""The learning loop: sample gates, run the frozen model through them, move the hypernetwork, never lose a step's work.

Noise and data of a step are functions of the seed and the step's number alone: that is all the random state there is.
"""

import dataclasses
import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dispc.checkpoint import Checkpoint
from dispc.corpus import Tokens, batch, load_tokens, windows
from dispc.errors import LearnError, first_line
from dispc.learn.budget import block_budget, final_sets, kept_parameters, regulariser
from dispc.learn.distributed import Processes
from dispc.learn.estimator import ESTIMATORS
from dispc.learn.hypernetwork import FreeLatents, HyperNetwork, Layout
from dispc.learn.objective import GatedModel
from dispc.learn.options import LearnOptions
from dispc.manifest import write_json
from dispc.masks import Masks
from dispc.reference import load_reference

CHECKPOINT, METRICS, OPTIONS = "checkpoint.pt", "metrics.jsonl", "options.json"
FORMAT_VERSION = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Progress = Callable[[dict[str, float], int], None]
"""Called after every step with its record (step, loss, regulariser, pruned, tokens_per_second) and the steps in all."""


def learn(options: LearnOptions, progress: Progress = lambda record, steps: None, *, resume: bool = False,
          force: bool = False) -> tuple[Masks, bool]:  # fmt: skip
    """Learn masks and write them to `options.output`; the masks, and whether this process is the one that wrote them.

    `resume` goes on from the checkpoint in the run's folder; without it, an earlier run there is kept unless `force`.

    Raises:
        DispcError: when an input is unusable, the budget cannot be met, or the loss is no number.
    """
    checkpoint = Checkpoint(options.model)
    budget = block_budget(checkpoint, options.pruning_ratio, options.ratio_of)
    length = options.sequence_length
    if length > checkpoint.config.max_positions:
        raise LearnError(
            f"sequence_length is {length}, {options.model} has {checkpoint.config.max_positions} positions; "
            "choose --sequence-length"
        )
    processes = Processes.join(options.device)
    if options.batch_size % processes.count:
        raise LearnError(f"batch_size {options.batch_size} cannot be shared by {processes.count} processes")
    rows = windows(load_tokens(options.data, options.model), length, options.data)
    if processes.main:
        _prepare_folder(options, resume=resume, force=force)
    processes.wait()
    trainer = Trainer(options, checkpoint, budget, processes)
    if resume:
        trainer.restore()
    trainer.run(rows, progress)
    masks = trainer.masks()
    if processes.main:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        masks.save(options.output, checkpoint.config)
    processes.wait()
    return masks, processes.main


def _prepare_folder(options: LearnOptions, *, resume: bool, force: bool) -> None:
    folder = options.folder
    if resume:
        if not (folder / CHECKPOINT).is_file():
            raise LearnError(f"{folder}: holds no checkpoint to resume; start without --resume")
        options.check_same(json.loads((folder / OPTIONS).read_text(encoding="utf-8")))
    elif folder.exists() or options.output.exists():
        if not force:
            what = folder if folder.exists() else options.output
            raise LearnError(f"{what}: exists; go on with --resume, or replace it with --force")
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / OPTIONS, options.as_dict())


class Trainer:
    """One learning run: the gated model, the source of latents, its optimiser, and the step it is at."""

    def __init__(self, options: LearnOptions, checkpoint: Checkpoint, budget: int, processes: Processes) -> None:
        self.options, self.config, self.budget, self.processes = options, checkpoint.config, budget, processes
        self.dense = self.config.block_parameters * self.config.num_hidden_layers
        self.step = 0
        cuda = processes.device.type == "cuda"
        precision = DTYPES[options.precision or ("bfloat16" if cuda else "float32")]
        model = load_reference(options.model, self.config.family, None, precision if cuda else torch.float32)
        self.gated = GatedModel(
            model,
            self.config,
            options.norm_scope,
            autocast=None if precision is torch.float32 else precision,
            checkpointing=options.activation_checkpointing,
        )
        model.to(processes.device)
        processes.shard(model, self.config)
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
        """All steps that remain, with a checkpoint every so many and at the end."""
        from contextlib import ExitStack

        options, folder = self.options, self.options.folder
        with ExitStack() as stack:
            log = stack.enter_context(open(folder / METRICS, "a", encoding="utf-8")) if self.processes.main else None
            board = stack.enter_context(_tensorboard(folder)) if options.tensorboard and self.processes.main else None
            while self.step < options.steps:
                start = time.perf_counter()
                record = self.advance(self._share(batch(rows, self.step, options.batch_size, options.seed)))
                seconds = time.perf_counter() - start
                record["tokens_per_second"] = options.batch_size * options.sequence_length / seconds
                if log:
                    log.write(json.dumps(record) + "\n")
                if board:
                    for name, value in record.items():
                        board.add_scalar(name, value, self.step)
                progress(record, options.steps)
                if self.step % options.checkpoint_every == 0 or self.step == options.steps:
                    if log:
                        log.flush()
                    self.save()

    def advance(self, ids: Tensor) -> dict[str, float]:
        """One step on this process's sequences ids [B,S]; the record of the step.

        Raises:
            LearnError: when the loss is no number; the latest checkpoint is as good as ever.
        """
        options = self.options
        latents = self.layout.expand(self.source())
        gates, counted = ESTIMATORS[options.estimator](latents, self._noise(), options.offset)
        leaf = gates.detach().requires_grad_()  # the model's part of the gradient ends here, and is averaged here
        loss = self.gated.loss(leaf, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        figures = self.processes.mean(torch.cat([leaf.grad, loss.detach().to(leaf)[None]]))
        kept = kept_parameters(counted, self.config)
        penalty = regulariser(kept, self.budget)
        record = {
            "step": self.step + 1,
            "loss": float(figures[-1]),
            "regulariser": float(penalty.detach()),
            "pruned": 1.0 - float(kept.detach()) / self.dense,
        }
        if not (math.isfinite(record["loss"]) and bool(torch.isfinite(figures).all())):
            saved = options.folder / CHECKPOINT
            remedy = f"go back to {saved} with --resume" if saved.exists() else "there is no checkpoint yet"
            raise LearnError(f"step {self.step + 1}: the loss or its gradient is not a number; {remedy}")
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward([gates, options.regulariser_weight * penalty], [figures[:-1], torch.ones_like(penalty)])
        for group in self.optimiser.param_groups:
            group["lr"] = options.rate(self.step)
        self.optimiser.step()
        self.step += 1
        return record

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
            "method": options.method, "pruning_ratio": str(options.pruning_ratio), "ratio_of": options.ratio_of,
            "data": Path(options.data).name, "steps": str(self.step), "seed": str(options.seed),
            "sequence_length": str(options.sequence_length), "batch_size": str(options.batch_size),
            "learning_rate": str(options.learning_rate), "decay": str(options.decay).lower(),
            "offset": str(options.offset), "align": str(options.align),
        }  # fmt: skip
        return dataclasses.replace(masks, metadata=metadata)

    def save(self) -> None:
        """Write the checkpoint; the older one stays until this one is whole and on the disk."""
        if not self.processes.main:
            return
        content = {
            "version": FORMAT_VERSION,
            "step": self.step,
            "source": self.source.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        path = self.options.folder / CHECKPOINT
        partial = path.with_name(f"{path.name}.partial")
        try:
            with open(partial, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except RuntimeError as error:  # torch's zip writer does not say that the disk is full
            raise LearnError(f"{partial}: cannot be written ({first_line(error)}); is the disk full?") from error
        finally:
            partial.unlink(missing_ok=True)

    def restore(self) -> None:
        """Go back to the checkpoint; the metrics of steps after it are dropped."""
        path = self.options.folder / CHECKPOINT
        try:
            content: dict[str, Any] = torch.load(path, map_location=self.processes.device, weights_only=True)
            if content["version"] != FORMAT_VERSION:
                raise LearnError(f"{path}: checkpoint version {content['version']}; this dispc reads {FORMAT_VERSION}")
            self.source.load_state_dict(content["source"])
            self.optimiser.load_state_dict(content["optimiser"])
            self.step = content["step"]
        except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise LearnError(f"{path}: is no checkpoint of this run ({first_line(error)})") from error
        if self.processes.main:
            metrics = self.options.folder / METRICS
            kept = (
                metrics.read_text(encoding="utf-8").splitlines(keepends=True)[: self.step] if metrics.exists() else []
            )
            metrics.write_text("".join(kept), encoding="utf-8")

    def _noise(self) -> Tensor:
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self.options.seed, self.step)).generate_state(1)[0])
        )
        size = sum(self.layout.widths)
        noise = torch.rand(size, generator=generator)
        return self.layout.expand(noise).to(self.processes.device)

    def _share(self, rows: Tokens) -> Tensor:
        size = len(rows) // self.processes.count
        mine = rows[self.processes.rank * size : (self.processes.rank + 1) * size]
        return torch.from_numpy(mine.astype(np.int64)).to(self.processes.device)


def _tensorboard(folder: Path) -> Any:
    from dispc.extras import need

    need("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
