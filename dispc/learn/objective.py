"""What is minimised: the language-model loss of the gated, frozen model, and how far it is from the budget.

Shapes: B sequences of a step, S positions, G gates (the sum of all set widths).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dispc.masks import SETS, NormScope, set_widths
from dispc.model.config import DecoderConfig
from dispc.reference.masked import apply_gates


class GatedModel:
    """A frozen transformers model whose sub-layers read, work and write through gates.

    Call `loss` only. Gates are one leaf tensor [G]: its gradient is all that the backward pass is for.
    """

    def __init__(
        self,
        model: Any,
        config: DecoderConfig,
        norm_scope: NormScope,
        *,
        autocast: torch.dtype | None = None,
        checkpointing: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config, self.autocast = config, autocast
        self.pieces: list[Tensor] = []
        blocks = config.num_hidden_layers
        number = {name: offset for offset, name in enumerate(SETS)}
        apply_gates(
            model, config.family, norm_scope, blocks, lambda index, name: self.pieces[index * len(SETS) + number[name]]
        )
        if checkpointing:
            for index in range(blocks):
                checkpoint_block(model.get_submodule(config.family.block(index)))

    def loss(self, gates: Tensor, ids: Tensor) -> Tensor:
        """Mean cross entropy of predicting ids [B,S] from the left, with gates [G]."""
        self.pieces = list(torch.split(gates, set_widths(self.config)))
        with torch.autocast(ids.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits = self.model(input_ids=ids, use_cache=False).logits
        return next_token_loss(logits, ids)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy of logits [B,S,V] at predicting the ids [B,S] one to the right, in float32."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all positions of KL(teacher || student), in nats, of logits [B,S,V] each, in float32."""
    ours, theirs = (functional.log_softmax(one.float().flatten(0, 1), dim=-1) for one in (logits, teacher))
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def checkpoint_block(block: nn.Module) -> None:
    """Keep only the block's input for the backward pass, which runs the block again."""
    forward = block.forward
    block.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
