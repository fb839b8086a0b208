"""Learning: a step samples gates, runs the frozen model through them, and trains the hypernetwork.

Noise and data of a step are functions of the seed and the step's number alone: that is all the random state there is.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dispc.learn import instant
from dispc.learn.budget import block_budget, budget_facts, check_fits, final_sets, kept_parameters, regulariser
from dispc.learn.distributed import Processes
from dispc.learn.estimator import ESTIMATORS
from dispc.learn.folder import BOARD, RunFolder
from dispc.learn.hypernetwork import FreeLatents, HyperNetwork, Layout, Started
from dispc.learn.objective import GatedModel
from dispc.learn.options import LearnOptions, check_one_of
from dispc.learn.run import Progress, Run, begin
from dispc.learn.start import first_latents
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.published import open_checkpoint
from dispc.model.text import TextTokens, load_tokens, source_name, windows
from dispc.reference.masked import mask_model
from dispc.support.errors import LearnError
from dispc.support.extras import need


def learn(
    options: LearnOptions,
    progress: Progress = lambda record, steps: None,
    *,
    resume: bool = False,
    force: bool = False,
    scoring: instant.Progress = lambda done, total: None,
) -> tuple[Masks, bool]:
    """Learn masks and write them to `options.output`; the masks, and whether this process is the one that wrote them.

    `resume` continues from the checkpoint in the run's folder, or starts at the beginning where there is none; without
    it, an earlier run there is kept unless `force`. Nothing is written or removed before the run is known to start.
    `scoring` gets the windows read, and all, while the positions of a ranked run are scored.

    Raises:
        DispcError: when an input is unusable, the budget cannot be met, or the loss is no number.
        Interrupted: when a signal ended the run, which is saved.
    """
    checkpoint = open_checkpoint(options.model)
    budget = block_budget(checkpoint, options.pruning_ratio, options.ratio_of)
    if options.start_from is not None:
        check_one_of("start_from", options.start_from, tuple(instant.METHODS))
    options, processes = begin(options, checkpoint, resume=resume, force=force)
    if options.tensorboard:
        need("tensorboard", "tensorboard")
    check_fits(checkpoint.config, budget, options.align, constrained=options.constrained)
    tokens = load_tokens(options.data, options.model)
    rows = windows(tokens, options.sequence_length, options.data)
    inputs = {
        "the model's configurations": checkpoint.config_sha256,
        "the model's weights": processes.digest(lambda: checkpoint.weights_sha256),
        "the tokens of the texts": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    first = None
    if options.start_from is not None and not (resume and processes.anywhere(RunFolder(options).checkpoint.exists())):
        pruned = 1.0 - budget / checkpoint.config.all_block_parameters
        first = first_latents(options, checkpoint, rows, pruned, processes, scoring)
    trainer = Trainer(options, checkpoint, budget, processes, inputs, first)
    trainer.start(resume=resume)
    with _on_board(trainer, progress) as noting:
        trainer.run(rows, noting)
    masks = trainer.masks()
    if processes.main:
        if resume and options.output.is_file() and (older := Masks.load(options.output)).sha256() == masks.sha256():
            masks = dataclasses.replace(masks, metadata={**older.metadata, **masks.metadata})  # a recorded perplexity
        masks.save(options.output, checkpoint.config)
    processes.wait()
    return masks, processes.main


class Trainer(Run[LearnOptions]):
    """One learning run: the gated model, the source of latents, and its optimiser.

    `first` are the latents of all sets [sum of set widths] with which a ranked run begins; None where its checkpoint
    has them, and in any other run.
    """

    def __init__(
        self,
        options: LearnOptions,
        checkpoint: Checkpoint,
        budget: int,
        processes: Processes,
        inputs: Mapping[str, str],
        first: Tensor | None = None,
    ) -> None:
        super().__init__(options, processes, inputs)
        self.checkpoint, self.config, self.budget = checkpoint, checkpoint.config, budget
        self.dense = self.config.all_block_parameters
        model = mask_model(checkpoint.empty_model(self.frozen), checkpoint, None)
        self.gated = GatedModel(
            model,
            self.config,
            options.norm_scope,
            autocast=self.autocast,
            checkpointing=options.activation_checkpointing,
        )
        processes.place(model, self.config, checkpoint.parameter)
        if options.compile:
            model.compile()
        self.layout = Layout.make(self.config, constrained=options.constrained)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            source: nn.Module = (
                HyperNetwork(self.layout.widths, gru=options.gru)
                if options.hypernetwork
                else FreeLatents(self.layout.widths)
            )
        if options.start_from is not None:
            widths = sum(self.layout.widths)
            source = Started(source, torch.zeros(widths) if first is None else self.layout.collect(first.cpu()))
        self.source = source.to(processes.device)
        self.optimiser = torch.optim.AdamW(
            self.source.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )

    def advance(self, rows: TextTokens) -> dict[str, float]:
        """One step on all processes' sequences rows [B,S]; the record of the step.

        Raises:
            LearnError: when the loss or a gradient is no number; the latest checkpoint stays valid.
        """
        options = self.options
        latents = self.layout.expand(self.source())
        gates, counted = ESTIMATORS[options.estimator](latents, self._noise(), options.offset)
        leaf = gates.detach().requires_grad_()  # the model's part of the gradient ends here, and is averaged here
        loss = self.gated.loss(leaf, self.processes.share(rows))
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        told = leaf.new_tensor(self.to_agree_on())
        figures = self.processes.mean(torch.cat([leaf.grad, loss.detach().to(leaf)[None], told]))
        gradient, (mean_loss, *agreed) = figures[:-3], figures[-3:].tolist()
        self.agree_on(*agreed)
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
        self.update()
        return record

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
        }
        metadata |= {} if options.start_from is None else {"start_from": options.start_from}
        metadata |= budget_facts(masks, self.checkpoint, options.ratio_of)
        return dataclasses.replace(masks, metadata=metadata)

    def state(self) -> dict[str, Any]:
        return {"source": self.source.state_dict(), "optimiser": self.optimiser.state_dict()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        self.optimiser.load_state_dict(state["optimiser"])

    def _noise(self) -> Tensor:
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self.options.seed, self.step)).generate_state(1)[0])
        )
        size = sum(self.layout.widths)
        noise = torch.rand(size, generator=generator)
        return self.layout.expand(noise).to(self.processes.device)


@contextmanager
def _on_board(trainer: Trainer, progress: Progress) -> Iterator[Progress]:
    """`progress`, which also shows every record in TensorBoard where the run has it."""
    if not (trainer.options.tensorboard and trainer.processes.main):
        yield progress
        return
    from torch.utils.tensorboard import SummaryWriter

    later = trainer.step + 1  # a resumed run repeats later steps
    with SummaryWriter(str(trainer.folder.path / BOARD), purge_step=later) as board:

        def both(record: Mapping[str, float], steps: int) -> None:
            progress(record, steps)
            for name, value in record.items():
                board.add_scalar(name, value, trainer.step)

        yield both
