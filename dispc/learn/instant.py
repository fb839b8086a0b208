"""Masks without learning, for baselines and quick tries: scores in place of latents, the same final sets.

A method is a row of `METHODS`: how it scores positions, and what it needs for that.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dispc.learn.budget import RatioOf, block_budget, budget_facts, check_fits, final_sets, position_costs
from dispc.learn.objective import GatedModel
from dispc.learn.options import check_choices, check_one_of
from dispc.masks import SETS, Masks, NormScope, set_widths
from dispc.model.checkpoint import Checkpoint
from dispc.model.config import DecoderConfig
from dispc.model.published import open_checkpoint
from dispc.model.text import TextTokens, load_tokens, source_name, windows
from dispc.reference.masked import load_reference
from dispc.runtime.devices import torch_device
from dispc.support.errors import DataError

MIDDLE = "mlp.mid"
Scores = npt.NDArray[np.float64]
WINDOWS = 16
"""Windows of text that a method reads."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What positions are scored of: the dense model, and what the methods that need it read. ids are [n,S]."""

    checkpoint: Checkpoint
    ids: Tensor | None
    device: torch.device
    seed: int = 0
    norm_scope: NormScope = "full"
    checkpointing: bool = False
    progress: Progress = lambda done, total: None

    @staticmethod
    def of(checkpoint: Checkpoint, rows: TextTokens | None, device: torch.device, **options: Any) -> "Subject":
        """With the text as the windows rows [n,S]; None where nothing is read."""
        ids = None if rows is None else torch.from_numpy(rows.astype(np.int64))
        return Subject(checkpoint=checkpoint, ids=ids, device=device, **options)

    @property
    def config(self) -> DecoderConfig:
        return self.checkpoint.config

    @property
    def text(self) -> Tensor:
        assert self.ids is not None, "only methods that read a text ask for it"
        return self.ids

    def load(self) -> Any:
        """The dense model, on the CPU."""
        return load_reference(self.checkpoint, None)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to score the positions of all sets: for each set, block after block, [width]; the highest stay."""

    score: Callable[[Subject], list[Scores]]
    reads: bool = False
    seeded: bool = False


def random(subject: Subject) -> list[Scores]:
    """Uniform numbers."""
    generator = np.random.default_rng(subject.seed)
    return [generator.random(width) for width in set_widths(subject.config)]


def magnitude(subject: Subject) -> list[Scores]:
    """The L2 norm of the weights that read or write a position, over the mean of its set."""
    return [_over_mean(norm) for norm in _weight_norms(subject.load(), subject.config)]


def activation(subject: Subject) -> list[Scores]:
    """The norm of a position's weights times that of what it carries over the text, over the mean of its set.

    For a write set, whose positions are the output itself, the norm of the output.
    """
    return [_over_mean(score) for score in _activation_scores(subject)]


def middle(subject: Subject) -> list[Scores]:
    """`activation` for the middle of the MLP alone, the same share in each block; all other sets are pruned last."""
    names = SETS * subject.config.num_hidden_layers
    scores = zip(names, _activation_scores(subject), strict=True)
    return [_ranks(score) + (name != MIDDLE) for name, score in scores]


def gradient(subject: Subject) -> list[Scores]:
    """The loss that pruning a position adds, estimated by gradients on the text, over the parameters that it costs.

    With a gate of 1 on every position, the mean square of the loss's gradient by the gate, of one window at a time, is
    the diagonal of the empirical Fisher information: half of it is the loss that shutting the gate adds, to second
    order (LeCun et al., "Optimal Brain Damage", 1990).
    """
    config = subject.config
    model = subject.load().to(subject.device)
    gated = GatedModel(model, config, subject.norm_scope, checkpointing=subject.checkpointing)
    widths = set_widths(config)
    squares = torch.zeros(sum(widths), dtype=torch.float64, device=subject.device)
    for number, row in enumerate(subject.text):
        gates = torch.ones(sum(widths), device=subject.device, requires_grad=True)
        gated.loss(gates, row[None].to(subject.device)).backward()  # type: ignore[no-untyped-call]
        assert gates.grad is not None
        squares += gates.grad.double().square()
        subject.progress(number + 1, len(subject.text))
    worth = np.split(squares.cpu().numpy(), np.cumsum(widths)[:-1])
    costs = dict(zip(SETS, position_costs(config), strict=True))
    names = SETS * config.num_hidden_layers
    return [score / costs[name] for name, score in zip(names, worth, strict=True)]


METHODS: dict[str, Method] = {
    "random": Method(score=random, seeded=True),
    "magnitude": Method(score=magnitude),
    "activation": Method(score=activation, reads=True),
    "middle": Method(score=middle, reads=True),
    "gradient": Method(score=gradient, reads=True),
}


def instant_masks(
    model: Path,
    method: str,
    ratio: float,
    *,
    ratio_of: RatioOf = "blocks",
    data: str | None = None,
    sequence_length: int = 2048,
    align: int = 1,
    seed: int = 0,
    norm_scope: NormScope = "full",
    device: str | None = "cpu",
    progress: Progress = lambda done, total: None,
) -> Masks:
    """Masks that keep the positions with the highest scores of all sets within one budget; `method` is of `METHODS`.

    Methods that read take `WINDOWS` windows of `data`, and run the model on `device`.

    Raises:
        DispcError: when a choice, the budget or the data is unusable.
    """
    check_choices(ratio_of=ratio_of, norm_scope=norm_scope, align=align, sequence_length=sequence_length, seed=seed)
    check_one_of("method", method, tuple(METHODS))
    chosen = METHODS[method]
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    budget = block_budget(checkpoint, ratio, ratio_of)
    check_fits(config, budget, align)
    metadata = {"method": method, "align": str(align), "pruning_ratio": str(ratio)}
    metadata |= {"seed": str(seed)} if chosen.seeded else {}
    rows, place = None, torch.device("cpu")
    if chosen.reads:
        if data is None:
            raise DataError(f"--method {method} needs a text: give --data FILE")
        place = torch_device(device)
        rows = windows(load_tokens(data, model), min(sequence_length, config.max_positions), data)[:WINDOWS]
        metadata |= {"data": source_name(data), "windows": str(len(rows)), "sequence_length": str(rows.shape[1])}
    subject = Subject.of(checkpoint, rows, place, seed=seed, norm_scope=norm_scope, progress=progress)
    scores = score_positions(method, subject)
    masks = final_sets(scores, config, budget, align=align, norm_scope=norm_scope)
    return replace(masks, metadata=metadata | budget_facts(masks, checkpoint, ratio_of))


def score_positions(method: str, subject: Subject) -> Scores:
    """The scores of all sets, block after block, [sum of set widths]."""
    scores: Scores = np.concatenate(METHODS[method].score(subject))
    return scores


def _over_mean(norm: Scores) -> Scores:
    """Sets of different kinds cannot be compared without it."""
    with np.errstate(invalid="ignore"):  # what is no number is found by `final_sets`
        scores: Scores = norm / max(norm.mean(), np.finfo(float).tiny)
    return scores


def _ranks(scores: Scores) -> Scores:
    """1 for the highest, 1/n for the lowest of n; what is no number stays so."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1) / len(scores)
    ranked: Scores = np.where(np.isfinite(scores), ranks, scores)
    return ranked


def _activation_scores(subject: Subject) -> list[Scores]:
    reference, config = subject.load(), subject.config
    norms = _weight_norms(reference, config)
    carried = _activation_norms(reference.to(subject.device), config, subject.text.to(subject.device), subject.progress)
    return [
        activation if name.endswith("write") else weight * activation
        for name, weight, activation in zip(SETS * config.num_hidden_layers, norms, carried, strict=True)
    ]


def _parts(model: nn.Module, config: DecoderConfig) -> list[tuple[list[Any], bool]]:
    """For every set, block after block: the linear layers it selects from, and whether it selects their inputs."""
    family, parts = config.family, []
    for index in range(config.num_hidden_layers):
        block = model.get_submodule(family.block(index))
        for names, inputs in (
            (family.attention_reads, True),
            ((family.attention_out,), False),
            (family.mlp_reads, True),
            ((family.down,), True),
            ((family.down,), False),
        ):
            parts.append(([block.get_submodule(name) for name in names], inputs))
    return parts


def _weight_norms(model: nn.Module, config: DecoderConfig) -> list[Scores]:
    """For every set the L2 norm of each position's weights, [width]."""
    return [
        torch.cat([layer.weight.detach().double().square().sum(0 if inputs else 1)[None] for layer in layers])
        .sum(0)
        .sqrt()
        .numpy()
        for layers, inputs in _parts(model, config)
    ]


@torch.no_grad()
def _activation_norms(
    model: Any, config: DecoderConfig, ids: Tensor, progress: Callable[[int, int], None]
) -> list[Scores]:
    """For every set the L2 norm, over all windows of ids [n,S], of what each position carries, [width]."""
    parts = _parts(model, config)
    sums = [torch.zeros(width, dtype=torch.float64, device=ids.device) for width in set_widths(config)]

    def listen(total: Tensor, inputs: bool) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            total.add_((given[0] if inputs else output).double().square().flatten(0, -2).sum(0))

        return hook

    for total, (layers, inputs) in zip(sums, parts, strict=True):
        layers[0].register_forward_hook(listen(total, inputs))  # all layers of a read set see the same input
    for number, row in enumerate(ids):
        model(input_ids=row[None], use_cache=False, logits_to_keep=1)
        progress(number + 1, len(ids))
    return [cast(Scores, total.sqrt().cpu().numpy()) for total in sums]
