"""The outputs of the masked reference for a text: in float64 as the truth, in the artifact's dtype for its own error.

The model is read block by block: a block's weights are loaded, all texts go through it in every precision, and the
weights are dropped. So float64 takes the memory of one block, whatever the size of the model, and logits are computed
in pieces, for the positions that are asked for.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from dispc.reference.blocks import Blocks, Entered
from dispc.support.arrays import Array, Tokens
from dispc.support.dtypes import DTYPES, name_of
from dispc.support.errors import ArtifactError

TINY = float(np.finfo(np.float64).tiny)
DRAWS = (0, 1, 2)
"""Times that the reference is read in the artifact's dtype: one error is a sample, and may be small by chance."""
LONG_TEXT, LONG_DRAWS = 256, (1, 2)
"""A text of more tokens is read less often: its many positions are samples too."""
ULPS = {"float32": 2.0, "float16": 0.5, "bfloat16": 0.5}
"""Units in the last place by which later draws are off: float32 kernels approximate exp and sigmoid to a few units,
those of halves compute in float32 and round once."""
TOLERANCE = {"float32": 2.5e-5, "float16": 2.5e-3, "bfloat16": 1.25e-2}
"""What a dtype is taken to cost, as a share of the range of an output, where no truth is finer than the dtype."""
PIECE_BYTES = 64 * 2**20
"""Logits that are in memory at once, for each reading."""


@dataclass(frozen=True)
class Text:
    """A sequence of tokens whose first one stands at position `offset`. Hashable, to be read once."""

    tokens: tuple[int, ...]
    offset: int = 0

    @property
    def array(self) -> Tokens:
        return np.array(self.tokens, dtype=np.int64)

    def begins(self, other: "Text") -> bool:
        """Whether `other` is this text or goes on from it."""
        return self.offset == other.offset and self.tokens == other.tokens[: len(self.tokens)]


@dataclass(frozen=True)
class Precision:
    """How a text is read: in `dtype` without rounding, or (`draw`) imitated in float32 with everything rounded to it.

    On the CPU a half-precision dtype is imitated: weights and every module's inputs and outputs are rounded to it and
    products are summed in float32, as GPU kernels do. torch's own float16 is ten times as slow there. From draw 1 on,
    numbers are off at random by up to ULPS units in the last place, as the arithmetic of other kernels is:

    - what goes into a module;
    - what an activation gives, in units of what went in: GELU is x (1 + tanh(..)) / 2, which is next to nothing left of
      zero, while kernels stay off by units of x;
    - weights of blocks that stand for `integers`, in units of the largest one of a row: kernels read
      (integer - zero point) * scale as the difference of two products.
    """

    dtype: torch.dtype
    draw: int | None = None
    integers: bool = False

    @property
    def computes_in(self) -> torch.dtype:
        return self.dtype if self.draw is None else torch.float32

    def cast(self, weight: Tensor) -> Tensor:
        """A float32 weight as this precision has it."""
        return weight.to(self.dtype).to(self.computes_in)

    def cast_in_block(self, weight: Tensor) -> Tensor:
        """The same of a weight of a block, which may stand for integers."""
        cast = self.cast(weight)
        if not (self.integers and self.draw and weight.ndim == 2):
            return cast
        seed = self.draw + crc32(cast[:1].numpy().tobytes())  # another one for each weight
        noise = 2 * torch.rand(cast.shape, generator=torch.Generator().manual_seed(seed)) - 1
        return cast + _reach(self.dtype) * cast.abs().amax(dim=1, keepdim=True) * noise


@dataclass
class Reading:
    """One text in one precision: what left the last block so far [1,S,d], in the end what enters the LM head.

    `streams` [S,d] by name, where asked for.
    """

    precision: Precision
    entered: Entered
    hidden: Tensor
    streams: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """One output at some token indices `at` [n]: of the truth [n, width], and of each draw in the artifact's dtype."""

    at: Tokens
    truth: Array
    own: tuple[Array, ...]


class Answers:
    """The outputs of the reference for texts; a text that is a prefix of another shares that one's outputs."""

    def __init__(self, blocks: Blocks, readings: Mapping[Text, Sequence[Reading]], dtype: str) -> None:
        self.blocks, self.readings, self.dtype = blocks, readings, dtype

    @property
    def has_own(self) -> bool:
        """Whether there is a reading in the artifact's dtype beside the truth."""
        return any(len(each) > 1 for each in self.readings.values())

    def source(self, text: Text) -> Text:
        """The text that was read and begins with `text`."""
        return next(known for known in self.readings if text.begins(known))

    def pieces(self, source: Text, name: str, at: Tokens) -> Iterator[Piece]:
        """The output `name` (`logits`, or `stream.N`) at the token indices `at` [n], a few at a time."""
        truth, *own = self.readings[source]
        for some in np.array_split(at, max(1, -(-len(at) // self._positions(name)))):
            yield Piece(some, self._output(truth, name, some), tuple(self._output(each, name, some) for each in own))

    def _positions(self, name: str) -> int:
        width = self.blocks.vocabulary if name == "logits" else self.blocks.hidden_size
        return max(1, PIECE_BYTES // (8 * int(width)))

    def _output(self, reading: Reading, name: str, at: Tokens) -> Array:
        if name != "logits":
            return reading.streams[name][at]
        with torch.inference_mode(), _rounded(self.blocks.head, reading.precision, seed=int(at[0])):
            logits: Array = self.blocks.logits(reading.hidden[:, torch.from_numpy(at)], reading.precision.cast).numpy()
        return logits


def truth_dtype(wanted: str | None) -> torch.dtype:
    """float64 unless float32 is `wanted`, which is twice as fast.

    Raises:
        ArtifactError: when `wanted` is neither.
    """
    if wanted not in (None, "float64", "float32"):
        raise ArtifactError(f"--reference-dtype {wanted}: choose float64 or float32")
    return torch.float32 if wanted == "float32" else torch.float64


def ask(
    blocks: Blocks,
    texts: Sequence[Text],
    truth: torch.dtype,
    dtype: str,
    *,
    streams: bool = False,
    integers: bool = False,
) -> Answers:
    """Read `texts`, once for the truth and several times in `dtype` where the truth is finer than that.

    With `streams` there are also the residual stream before the first block (`stream.0`) and after each
    sub-layer, two for each block. `integers` says that weights are stored as such. The weights of the blocks are
    consumed.
    """
    readings: dict[Text, list[Reading]] = {text: [] for text in sources(texts)}
    with torch.inference_mode():
        for precision in precisions(truth, dtype, integers=integers):
            with blocks.outer(precision.cast), _rounded(blocks.model, precision):
                for text, read in readings.items():
                    if precision.draw is None or precision.draw in draws(text):
                        entered = blocks.enter(text.array, text.offset, precision.cast)
                        read.append(Reading(precision, entered, entered.hidden))
        if streams:
            for reading in _all(readings):
                _keep(reading, 0, reading.hidden)
        for index in range(len(blocks)):
            with blocks.loaded(index):
                _run_block(blocks, index, _all(readings), streams=streams)
        for text, read in readings.items():
            for reading in read:
                with blocks.outer(reading.precision.cast), _rounded(blocks.model, reading.precision, seed=-1):
                    cast = reading.precision.cast
                    reading.hidden = blocks.leave(text.array, text.offset, cast, reading.hidden)
    return Answers(blocks, readings, dtype)


def sources(texts: Sequence[Text]) -> list[Text]:
    """The texts that have to be read, longest first: those that do not begin another."""
    sources: list[Text] = []
    for text in sorted(dict.fromkeys(texts), key=lambda text: -len(text.tokens)):
        if not any(text.begins(known) for known in sources):
            sources.append(text)
    return sources


def precisions(truth: torch.dtype, dtype: str, *, integers: bool = False) -> list[Precision]:
    """The truth's, and where it is finer than `dtype` that of every draw."""
    own = DTYPES[dtype].torch
    return [Precision(truth), *(Precision(own, draw, integers) for draw in DRAWS if own != truth)]


def draws(text: Text) -> tuple[int, ...]:
    return LONG_DRAWS if len(text.tokens) > LONG_TEXT else DRAWS


def _all(readings: Mapping[Text, list[Reading]]) -> list[Reading]:
    return [reading for read in readings.values() for reading in read]


def _run_block(blocks: Blocks, index: int, readings: Sequence[Reading], *, streams: bool) -> None:
    """Let every reading pass block `index`; those of one precision follow each other, so that it is cast once."""
    written: list[Tensor] = []
    handles: list[Any] = []
    if streams:
        names, factor = blocks.config.family.sub_layers["attention"], blocks.config.residual_multiplier
        last = blocks[index].get_submodule(names.after or names.write)
        handles.append(last.register_forward_hook(lambda module, args, output: written.append(factor * output)))
    try:
        for precision in dict.fromkeys(reading.precision for reading in readings):
            with blocks.cast(index, precision.cast_in_block), _rounded(blocks[index], precision, seed=index):
                for reading in readings:
                    if reading.precision == precision:
                        entering, reading.hidden = reading.hidden, blocks.run(index, reading.hidden, reading.entered)
                        if streams:
                            _keep(reading, 2 * index + 1, entering + written.pop())
                            _keep(reading, 2 * index + 2, reading.hidden)
    finally:
        for handle in handles:
            handle.remove()


def _keep(reading: Reading, number: int, stream: Tensor) -> None:
    reading.streams[f"stream.{number}"] = stream.reshape(-1, stream.shape[-1]).numpy()


def divergence(truth: Array, found: Array) -> Array:
    """KL of the token distributions under logits [n,V], in nats [n]; not below zero."""
    p, q = _log_softmax(truth), _log_softmax(found)
    result: Array = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    return result


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


@contextmanager
def freed(model: nn.Module) -> Iterator[nn.Module]:
    """The model, whose weights are freed at the end.

    Masked models refer to themselves, and would stay until the garbage collector runs.
    """
    try:
        yield model
    finally:
        for parameter in model.parameters():
            parameter.data = torch.empty(0)


@contextmanager
def _rounded(part: nn.Module, precision: Precision, seed: int = 0) -> Iterator[None]:
    """Round what goes into and comes out of every module of `part` without parts, as the precision has it."""
    draw, dtype = precision.draw, precision.dtype
    generator = torch.Generator().manual_seed(1000 * (draw or 0) + seed + 1)

    def before(module: nn.Module, inputs: Any) -> Any:
        return tuple(_round(_shake(value, dtype, generator) if draw else value, dtype) for value in inputs)

    def after(module: nn.Module, inputs: Any, output: Any) -> Any:
        if draw and _is_activation(module, inputs, output):
            output = output + _noise(output.shape, torch.float32, generator) * inputs[0].abs()
        return _round(output, dtype)

    handles: list[Any] = []
    if draw or (draw == 0 and dtype != torch.float32):
        for module in part.modules():
            if not any(True for _ in module.children()):
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shake(value: Any, dtype: torch.dtype, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value * (1 + _noise(value.shape, dtype, generator))


def _noise(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Uniform, up to ULPS units in the last place of 1."""
    return (2 * torch.rand(shape, generator=generator) - 1) * _reach(dtype)


def _is_activation(module: nn.Module, inputs: Any, output: Any) -> bool:
    """Whether a module without parts is a function of each number by itself."""
    return (
        next(module.parameters(), None) is None
        and isinstance(output, Tensor)
        and output.is_floating_point()
        and output.shape == inputs[0].shape
    )


def _reach(dtype: torch.dtype) -> float:
    """ULPS units in the last place, of 1."""
    return ULPS[name_of(dtype)] * torch.finfo(dtype).eps


def _round(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_round(part, dtype) for part in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype).to(value.dtype)
    return value
