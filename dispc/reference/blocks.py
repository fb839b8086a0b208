"""A decoder of transformers taken apart into its blocks, so that one after another can be loaded, run and dropped.

transformers' own code runs: what it hands to each block (masks, rotary angles) is noted in a pass in which blocks do
nothing, and what it makes of the last block's output in another.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.config import DecoderConfig
from dispc.model.family import Family
from dispc.model.pretrained import set_parameters
from dispc.reference.masked import mask_model

Cast = Callable[[Tensor], Tensor]
"""What a precision makes of a weight in float32."""
NO_MASK = "dispc-no-mask"
"""The name under which transformers knows an attention that has no masks."""
HEAD_ROWS = 8192
"""Rows of the LM head that are cast at a time."""


@dataclass
class Entered:
    """What goes into the first block [1,S,d], and what else each block is called with."""

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


class Blocks:
    """`model` (a causal language model in float32), one block at a time.

    `load(index)` reads the parameters of that block; those outside of the blocks are loaded already.
    """

    def __init__(self, model: Any, config: DecoderConfig, load: Callable[[int], None] = lambda index: None) -> None:
        self.model, self.config, self.load = model, config, load
        family = config.family
        self.decoder = model.get_submodule(family.layers.rpartition(".")[0])
        self.head = model.get_output_embeddings()
        self.embedding = model.get_input_embeddings()
        self.table: Tensor = self.embedding.weight.data
        self.blocks = list(model.get_submodule(family.layers))
        self.forwards = [block.forward for block in self.blocks]
        self.returns_tuple = False
        large = {id(self.embedding.weight), id(self.head.weight)}
        self.rest = [
            parameter
            for name, parameter in model.named_parameters()
            if outside_blocks(family, name) and id(parameter) not in large
        ]
        self.vocabulary, self.hidden_size = self.head.weight.shape

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> nn.Module:
        block: nn.Module = self.blocks[index]
        return block

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """Block `index` with its weights, which are dropped at the end."""
        self.load(index)
        try:
            yield
        finally:
            for parameter in self.blocks[index].parameters():
                parameter.data = torch.empty(0)

    def cast(self, index: int, cast: Cast) -> Any:
        """A context in which the weights of block `index` are what `cast` makes of them."""
        return _cast(list(self.blocks[index].parameters()), cast)

    def outer(self, cast: Cast) -> Any:
        """The same for what is outside of the blocks, token embedding and LM head excepted, which are never cast."""
        return _cast(self.rest, cast)

    def enter(self, tokens: npt.NDArray[np.int64], offset: int, cast: Cast) -> Entered:
        """What transformers hands to the blocks for `tokens` [S] at the positions from `offset` on."""
        entered = Entered(torch.empty(0), [])

        def note(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not entered.calls:
                entered.hidden = x
            entered.calls.append((args, kwargs))
            return entered.hidden[None]  # right for what takes the first of a tuple; nobody looks at the result

        self._through(tokens, offset, cast, [note] * len(self))
        return entered

    def run(self, index: int, hidden: Tensor, entered: Entered) -> Tensor:
        """Block `index`: [1,S,d] to [1,S,d]."""
        args, kwargs = entered.calls[index]
        self.blocks[index].forward = self.forwards[index]
        output: Any = self.blocks[index](hidden, *args, **kwargs)
        self.returns_tuple = isinstance(output, tuple)
        result: Tensor = output[0] if self.returns_tuple else output
        return result

    def leave(self, tokens: npt.NDArray[np.int64], offset: int, cast: Cast, hidden: Tensor) -> Tensor:
        """What enters the LM head [1,S,d] when the last block's output is `hidden`."""

        def last(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self.returns_tuple else hidden

        with _without_masks(self.decoder.config):  # no block looks at one, and they take longer than all else here
            result: Tensor = self._through(tokens, offset, cast, [last] * len(self)).last_hidden_state
        return result

    def logits(self, hidden: Tensor, cast: Cast) -> Tensor:
        """Logits [n,V] of what enters the LM head [1,n,d]."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        output = BaseModelOutputWithPast(last_hidden_state=hidden)
        with _replaced(self.decoder, lambda *args, **kwargs: output), _replaced(self.head, partial(self._head, cast)):
            logits: Tensor = self.model(input_ids=torch.zeros(1, hidden.shape[1], dtype=torch.long)).logits[0]
        return logits

    def _head(self, cast: Cast, hidden: Tensor) -> Tensor:
        weight, bias = self.head.weight, self.head.bias
        pieces = [hidden @ cast(weight[start : start + HEAD_ROWS]).T for start in range(0, len(weight), HEAD_ROWS)]
        logits = torch.cat(pieces, dim=-1)
        return logits if bias is None else logits + cast(bias)

    def _through(self, tokens: npt.NDArray[np.int64], offset: int, cast: Cast, forwards: list[Any]) -> Any:
        """Run the decoder with `forwards` in the place of its blocks.

        The embedding is cut to the tokens that occur, renumbered: in float64 the whole would be the largest tensor.
        """
        for block, forward in zip(self.blocks, forwards, strict=True):
            block.forward = forward
        unique, numbered = np.unique(tokens, return_inverse=True)
        more = {"position_ids": torch.arange(offset, offset + len(tokens))[None]} if offset else {}
        rows = cast(self.table[torch.from_numpy(unique)])
        with _cast([self.embedding.weight], lambda weight: rows):
            return self.decoder(input_ids=torch.from_numpy(numbered)[None], use_cache=False, **more)


def outside_blocks(family: Family, parameter: str) -> bool:
    return not parameter.startswith(f"{family.layers}.")


def read_lazily(
    checkpoint: Checkpoint, masks: Masks, as_stored: Callable[[nn.Module, int | None], None] = lambda part, index: None
) -> Blocks:
    """The masked reference of `checkpoint` in float32, each block read when it is needed.

    `as_stored` gets every part that was read, a block with its number or the model with None when all outside of its
    blocks was read, to round its weights as an artifact stores them.
    """
    model, family = checkpoint.empty_model(torch.float32), checkpoint.family

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        return checkpoint.parameter(name, shape).to(torch.float32)

    def load(index: int) -> None:
        name = family.block(index)
        block = model.get_submodule(name)
        set_parameters(block, lambda inner, shape: read(f"{name}.{inner}", shape))
        as_stored(block, index)

    set_parameters(model, read, partial(outside_blocks, family))
    mask_model(model, checkpoint, masks)
    as_stored(model, None)
    return Blocks(model, checkpoint.config, load)


@contextmanager
def _cast(parameters: list[nn.Parameter], cast: Cast) -> Iterator[None]:
    kept = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = cast(parameter.data)
        yield
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data


@contextmanager
def _without_masks(config: Any) -> Iterator[None]:
    """transformers makes no attention masks for models of `config`."""
    from transformers.masking_utils import AttentionMaskInterface

    AttentionMaskInterface.register(NO_MASK, lambda *args, **kwargs: None)
    kept = config._attn_implementation
    config._attn_implementation = NO_MASK
    try:
        yield
    finally:
        config._attn_implementation = kept


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.forward
    module.forward = forward
    try:
        yield
    finally:
        module.forward = own
