"""What the masked reference says of a text: in float64 for the truth, in the artifact's dtype for what that costs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dispc.model.families import Family
from dispc.support.dtypes import DTYPES, name_of
from dispc.support.errors import ArtifactError

Array = npt.NDArray[Any]
TINY = float(np.finfo(np.float64).tiny)
DRAWS = 3
"""Times that the reference is read in the artifact's dtype: one error is a sample, and may be small by luck."""
ULPS = {"float32": 2.0, "float16": 0.5, "bfloat16": 0.5}
"""Units in the last place by which later draws are off: float32 kernels approximate exp and sigmoid to a few units,
those of halves compute in float32 and round once."""
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

    Outputs are arrays [S, width] by name: `logits`, and where streams were asked for `stream.0` to `stream.N`. `own`
    has the largest error of any draw at each position [S] by name, and under `KL` the mean divergence of the logits.
    """

    def __init__(
        self, truth: dict[Text, dict[str, Array]], own: dict[Text, dict[str, Array]] | None, dtype: str
    ) -> None:
        self.truth, self.own, self.dtype = truth, own, dtype
        self.floors: dict[str, float] = {}

    def own_error(self, text: Text, name: str) -> Array:
        """Largest error that the dtype itself makes at each position [S]."""
        if self.own is not None:
            return self.own[text][name]
        truth = self.truth[text][name]
        return np.full(len(truth), TOLERANCE[self.dtype] * max(float(np.ptp(truth)), TINY))

    def own_divergence(self, text: Text) -> Array:
        """KL divergence, in nats, that the dtype itself makes at each position [S]."""
        return 0.5 * self.own_error(text, "logits") ** 2 if self.own is None else self.own[text]["KL"]

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
    """Read all `texts` with the model that `load` gives in float32, once for the truth and DRAWS times in `dtype`.

    On the CPU a half-precision dtype is imitated: weights and every module's inputs and outputs are rounded to it and
    products are summed in float32, as GPU kernels do. torch's own float16 is ten times as slow there.
    """
    own = DTYPES[dtype].torch
    texts = list(dict.fromkeys(texts))
    model = load()
    read = _read_streams if streams else _read_logits
    with torch.inference_mode(), freed(model):
        _cast(model, truth)
        found = {text: read(model, family, text) for text in texts}
        if own == truth:
            return Answers(found, None, dtype)
        _round_weights(model, own)
        errors: dict[Text, dict[str, Array]] = {text: {} for text in texts}
        for draw in range(DRAWS):
            with _rounded_activations(model, own, draw):
                for text in texts:
                    _take(errors[text], found[text], read(model, family, text))
    return Answers(found, errors, dtype)


def _take(errors: dict[str, Array], truth: dict[str, Array], rounded: dict[str, Array]) -> None:
    """Add one draw to the errors of a text: the largest of each output, the mean of the divergence."""
    for name, value in rounded.items():
        error = np.abs(value.astype(np.float64) - truth[name]).max(axis=-1)
        errors[name] = np.maximum(errors.get(name, 0.0), error)
    errors["KL"] = errors.get("KL", 0.0) + divergence(truth["logits"], rounded["logits"]) / DRAWS


def divergence(truth: Array, found: Array) -> Array:
    """KL of the token distributions under logits [n,V], in nats [n]; not below zero."""
    p, q = _log_softmax(truth), _log_softmax(found)
    result: Array = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    return result


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def round_storage(model: nn.Module, dtype: torch.dtype) -> None:
    """Round, in place, what an artifact stores in `dtype`: weights, and the cosines and sines of rotary positions.

    What is left when such an artifact computes in float32 is float32's own error.
    """
    _round_weights(model, dtype)
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_hook(lambda m, x, y: _rounded(y, dtype))


@contextmanager
def freed(model: nn.Module) -> Iterator[nn.Module]:
    """The model for a while, and its weights no longer.

    Masked models refer to themselves, and would wait for a collector that is slow.
    """
    try:
        yield model
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
def _rounded_activations(model: nn.Module, dtype: torch.dtype, draw: int) -> Iterator[None]:
    """Round what goes into and comes out of every module without parts.

    From the second draw on, what goes in is off by up to ULPS units in the last place as well, at random: arithmetic
    that falls out another way, as it does in other kernels.
    """
    generator = torch.Generator().manual_seed(draw)

    def before(module: nn.Module, inputs: Any) -> Any:
        return tuple(_rounded(_shaken(value, dtype, generator) if draw else value, dtype) for value in inputs)

    handles: list[Any] = []
    if dtype != torch.float32 or draw:
        for module in model.modules():
            if any(True for _ in module.children()):
                continue
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(lambda m, x, y: _rounded(y, dtype)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shaken(value: Any, dtype: torch.dtype, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    reach = ULPS[name_of(dtype)] * torch.finfo(dtype).eps
    return value * (1 + (2 * torch.rand(value.shape, generator=generator) - 1) * reach)


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
