"""One run of recovery: the masked model is trained step by step, and judged by held-out text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dispc.learn.adapter import add_adapters, first_values, trained_parameters, unwrapped
from dispc.learn.distributed import Processes, gathered, like, set_parameter
from dispc.learn.objective import checkpoint_block, divergence, next_token_loss
from dispc.learn.recovery_options import LOSSES, RecoverOptions
from dispc.learn.run import Run
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.text import TextTokens
from dispc.reference.masked import mask_forward, mask_model

CLIP = 1.0
"""Largest norm of a step's gradient."""


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


class Recovery(Run[RecoverOptions]):
    """One run: the masked model and its teacher, the optimiser, and the weights that `held_out` found best so far."""

    def __init__(
        self,
        options: RecoverOptions,
        checkpoint: Checkpoint,
        teacher: Checkpoint,
        masks: Masks,
        processes: Processes,
        held_out: TextTokens,
        inputs: Mapping[str, str],
    ) -> None:
        super().__init__(options, processes, inputs)
        self.held_out, self.checkpoint = held_out, checkpoint
        config, family = checkpoint.config, checkpoint.config.family
        self.weights = LOSSES[options.loss]
        self.teacher = mask_model(teacher.empty_model(self.frozen), teacher, None).requires_grad_(False)
        empty = checkpoint.empty_model(self.frozen if options.lora else torch.float32)
        self.model = mask_model(empty, checkpoint, None).requires_grad_(False)
        self.wrapped = add_adapters(self.model, config, options.lora) if options.lora else None
        if not options.lora:
            for index in range(config.num_hidden_layers):
                self.model.get_submodule(family.block(index)).requires_grad_(True)
        processes.place(self.teacher, teacher.config, teacher.parameter)
        processes.place(self.model, config, self._first)
        mask_forward(self.model, family, masks)
        if options.activation_checkpointing:
            for index in range(config.num_hidden_layers):
                checkpoint_block(self.model.get_submodule(family.block(index)))
        self.trained = trained_parameters(self.model)
        self.optimiser = torch.optim.AdamW(
            self.trained.values(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.judgements: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}

    def _first(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The values that a parameter begins with. Those outside of the sets are not used, and not written."""
        adapter = first_values(name, shape, self.options.seed)
        return self.checkpoint.parameter(unwrapped(name), shape) if adapter is None else adapter

    @property
    def best_judgement(self) -> dict[str, float]:
        return min(self.judgements, key=lambda one: one["loss"])  # the first of equal ones

    def advance(self, rows: TextTokens) -> dict[str, float] | None:
        """One step on all processes' sequences rows [B,S]; its record, None where its loss or gradient is no number."""
        options, size = self.options, self.options.batch_size
        self.optimiser.zero_grad(set_to_none=True)
        losses = torch.zeros(2, device=self.processes.device)
        for start in range(0, len(rows), size):
            parts = self.losses(self.processes.share(rows[start : start + size]))
            self.total(parts / options.accumulate).backward()  # type: ignore[no-untyped-call]
            losses += parts.detach() / options.accumulate
        told = losses.new_tensor(self.to_agree_on())
        norm = gathered(nn.utils.clip_grad_norm_(self.trained.values(), CLIP))
        distil, text, *agreed = self.processes.mean(torch.cat([losses, told])).tolist()
        self.agree_on(*agreed)
        loss = self.weights[0] * distil + self.weights[1] * text
        if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
            self.ended = f"step {self.step + 1}: the loss or its gradient is not a number"
            return None
        self.update()
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

    def judged(self) -> dict[str, float]:
        return self.judge() if self.over or self.step % self.options.evaluate_every == 0 else {}

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Judge the weights as they are by the held-out windows, and keep them where they are the best so far."""
        count = self.processes.count
        rows = -(-len(self.held_out) // count) * count  # some twice, so that all processes have equally many
        mine = self.processes.share(np.resize(self.held_out, (rows, self.held_out.shape[1])))
        size = max(1, self.options.batch_size // count)
        sums = torch.zeros(2, device=mine.device)
        for start in range(0, len(mine), size):
            piece = mine[start : start + size]
            sums += self.losses(piece) * len(piece)
        distil, text = self.processes.mean(sums / len(mine)).tolist()
        loss = self.weights[0] * distil + self.weights[1] * text
        judgement = {"step": self.step, "loss": loss, "distil": distil, "text": text}
        if not self.judgements or loss < self.best_judgement["loss"]:
            self.best = gathered(self.trained)
        self.judgements.append(judgement)
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
            set_parameter(parameter, self.best[name])

    def state(self) -> dict[str, Any]:
        return {
            "judgements": self.judgements,
            "best": self.best,
            "ended": self.ended,
            "trained": gathered(self.trained),
            "optimiser": gathered(self.optimiser.state_dict()),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        for name, parameter in self.trained.items():
            set_parameter(parameter, state["trained"][name])
        optimiser = state["optimiser"]
        for number, parameter in enumerate(self.trained.values()):
            moments = optimiser["state"][number]
            optimiser["state"][number] = {
                key: like(parameter, value) if value.shape == parameter.shape else value
                for key, value in moments.items()
            }
        self.optimiser.load_state_dict(optimiser)
        self.judgements, self.best, self.ended = state["judgements"], state["best"], state["ended"]
