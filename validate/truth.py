"""What the masked reference says of a text: in float64 for the truth, in the artifact's dtype for what that costs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dispc.errors import ArtifactError
from dispc.families import Family
from dispc.validate.session import Array

TINY = float(np.finfo(np.float64).tiny)
LARGE = 1_000_000_000
"""Parameters above which the truth is float32 unless asked otherwise: a float64 model takes 8 bytes for each."""


@dataclass(frozen=True)
class Text:
    """A sequence of tokens whose first one stands at position `offset`. Hashable, to be read once."""

    tokens: tuple[int, ...]
    offset: int = 0

    @property
    def array(self) -> Array:
        return np.array(self.tokens, dtype=np.int64)


TOLERANCE = {"float32": 2.5e-5, "float16": 2.5e-3, "bfloat16": 1.25e-2}
"""What a dtype is taken to cost, as a share of the range of an output, where no truth is finer than the dtype."""


class Answers:
    """By text: the outputs of the truth, and how far the reference in the artifact's dtype is from them.

    Outputs are arrays [S, width] by name: `logits`, and where streams were asked for `stream.0` to `stream.N`.
    """

    def __init__(
        self, truth: dict[Text, dict[str, Array]], rounded: dict[Text, dict[str, Array]] | None, dtype: str
    ) -> None:
        self.truth, self.rounded, self.dtype = truth, rounded, dtype
        self.floors: dict[str, float] = {}

    def own_error(self, text: Text, name: str) -> Array:
        """Largest error that the dtype itself makes at each position [S]."""
        truth = self.truth[text][name]
        if self.rounded is None:
            return np.full(len(truth), TOLERANCE[self.dtype] * max(float(np.ptp(truth)), TINY))
        error: Array = np.abs(self.rounded[text][name].astype(np.float64) - truth).max(axis=-1)
        return error

    def floor(self, name: str) -> float:
        """The own error that nine of ten positions do not exceed: less than this is luck of the position."""
        if name not in self.floors:
            every = np.concatenate([self.own_error(text, name) for text in self.truth])
            self.floors[name] = max(float(np.quantile(every, 0.9)), TINY)
        return self.floors[name]


def truth_dtype(parameters: int, wanted: str | None, *, room: bool = True) -> torch.dtype:
    """float64, or float32 for models that are large or leave no `room`; `wanted` decides where it is given.

    Raises:
        ArtifactError: when `wanted` is neither.
    """
    if wanted not in (None, "float64", "float32"):
        raise ArtifactError(f"--reference-dtype {wanted}: choose float64 or float32")
    large = parameters > LARGE or not room if wanted is None else wanted == "float32"
    return torch.float32 if large else torch.float64


def ask(
    load: Callable[[], Any], family: Family, texts: Sequence[Text], truth: torch.dtype, dtype: str, *, streams: bool
) -> Answers:
    """Read all `texts` twice with the model that `load` gives in float32, which is kept no longer than needed.

    On the CPU a half-precision dtype is imitated: weights and every module's inputs and outputs are rounded to it and
    products are summed in float32, as GPU kernels do. torch's own float16 is ten times as slow there.
    """
    own = getattr(torch, dtype)
    texts = list(dict.fromkeys(texts))
    model = load()
    read = _read_streams if streams else _read_logits
    with torch.inference_mode(), _freed(model):
        _cast(model, truth)
        found = {text: read(model, family, text) for text in texts}
        if own == truth:
            return Answers(found, None, dtype)
        _round_weights(model, own)
        with _rounded_activations(model, own):
            rounded = {text: read(model, family, text) for text in texts}
    return Answers(found, rounded, dtype)


@contextmanager
def _freed(model: nn.Module) -> Iterator[None]:
    """Let go of the weights at the end: masked models refer to themselves, and wait for a collector that is slow."""
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.data = torch.empty(0)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: buffers are rotary frequencies, float32 in every dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(torch.float32)


@contextmanager
def _rounded_activations(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Round what goes into and comes out of every module without parts, and of every block."""
    handles: list[Any] = []
    if dtype != torch.float32:
        for module in model.modules():
            if any(True for _ in module.children()):
                continue
            handles.append(module.register_forward_pre_hook(lambda m, x: tuple(_rounded(v, dtype) for v in x)))
            handles.append(module.register_forward_hook(lambda m, x, y: _rounded(y, dtype)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_rounded(part, dtype) for part in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype).to(value.dtype)
    return value


def _read_logits(model: Any, family: Family, text: Text) -> dict[str, Array]:
    ids = torch.from_numpy(text.array)[None]
    more = {} if not text.offset else {"position_ids": torch.arange(text.offset, text.offset + len(text.tokens))[None]}
    return {"logits": model(input_ids=ids, use_cache=False, **more).logits[0].numpy()}


def _read_streams(model: Any, family: Family, text: Text) -> dict[str, Array]:
    """The residual stream in front of the first block (`stream.0`) and behind each sub-layer, two for each block."""
    streams: dict[str, Array] = {}
    entering: dict[int, Tensor] = {}
    handles: list[Any] = []

    def keep(number: int, value: Tensor) -> None:
        streams[f"stream.{number}"] = value[0].reshape(len(text.tokens), -1).numpy().copy()

    def enter(index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        entering[index] = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            keep(0, entering[0])

    def attention(index: int, module: nn.Module, args: Any, output: Tensor) -> None:
        keep(2 * index + 1, entering[index] + output)

    def leave(index: int, module: nn.Module, args: Any, output: Any) -> None:
        keep(2 * index + 2, output[0] if isinstance(output, tuple) else output)

    for index in range(len(model.get_submodule(family.layers))):
        block = model.get_submodule(family.block(index))
        handles.append(block.register_forward_pre_hook(partial(enter, index), with_kwargs=True))
        handles.append(block.get_submodule(family.attention_out).register_forward_hook(partial(attention, index)))
        handles.append(block.register_forward_hook(partial(leave, index)))
    try:
        return _read_logits(model, family, text) | streams
    finally:
        for handle in handles:
            handle.remove()
