"""Rotary positions in config.json, in the spelling of transformers 4 or 5, or in both.

Release 4 writes `rope_theta`, `rope_scaling` and `partial_rotary_factor` side by side (GPT-NeoX: `rotary_emb_base`,
`rotary_pct`; Gemma 3: `rope_local_base_freq` for its sliding blocks); release 5 writes all of it into
`rope_parameters`, for Gemma 3 once for each kind of block. Each release ignores some of what the other writes.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dispc.support.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from dispc.model.family import Family

THETA = ("rope_theta", "rotary_emb_base")
SHARE = ("partial_rotary_factor", "rotary_pct", "rope_pct")
LOCAL_THETA = "rope_local_base_freq"
SCALING = ("rope_parameters", "rope_scaling")
ROPE_KEYS = frozenset((*THETA, *SHARE, *SCALING, LOCAL_THETA))
"""Keys of config.json that are read here and nowhere else."""
FULL, SLIDING = "full_attention", "sliding_attention"
TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
"""Kinds of rotary scaling: keys that each requires, and keys that it may have."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotary positions of the blocks of one kind.

    `share` of each head is rotated, at frequencies that `theta` gives and `scaling` (with its `rope_type`) changes.
    """

    theta: float
    share: float
    scaling: Mapping[str, Any]

    def frequencies(self, head_dim: int) -> tuple[npt.NDArray[np.float64], float]:
        """Radians per position [rotated dimensions / 2], and the factor of cosines and sines.

        RoPE (Su et al. 2021), position interpolation (Chen et al. 2023), Llama 3.1's by wavelength, YaRN (Peng et al.
        2023). Worked out here to check what transformers makes of a config; the tables themselves are transformers'.

        Raises:
            CheckpointError: when the dimensions that rotate are none, or no pairs.
        """
        rotated = int(head_dim * self.share)
        if rotated < 2 or rotated % 2:
            raise CheckpointError(f"{rotated} dimensions of each head of {head_dim} rotate; an even number is expected")
        plain = self.theta ** -(np.arange(0, rotated, 2) / rotated)
        kind, factor = self.scaling["rope_type"], self.scaling.get("factor", 1.0)
        if kind == "llama3":
            return self._by_wavelength(plain), 1.0
        if kind == "yarn":
            return self._yarn(plain, rotated)
        return plain / factor, 1.0

    def _by_wavelength(self, plain: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        factor, low, high, length = (self.scaling[name] for name in TYPES["llama3"][0])
        keep = np.clip((length * plain / (2 * math.pi) - low) / (high - low), 0, 1)
        scaled: npt.NDArray[np.float64] = (1 - keep) * plain / factor + keep * plain
        return scaled

    def _yarn(self, plain: npt.NDArray[np.float64], rotated: int) -> tuple[npt.NDArray[np.float64], float]:
        given = self.scaling
        factor, length = given["factor"], given["original_max_position_embeddings"]

        def dimension(rotations: float) -> float:
            return rotated * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        first, last = dimension(given.get("beta_fast") or 32), dimension(given.get("beta_slow") or 1)
        if given.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotated - 1)
        ramp = np.clip((np.arange(len(plain)) - first) / ((last - first) or 0.001), 0, 1)

        def temper(scale: float) -> float:
            return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

        stretch = given.get("attention_factor")
        if stretch is None:
            one, all_dimensions = given.get("mscale"), given.get("mscale_all_dim")
            stretch = temper(one) / temper(all_dimensions) if one and all_dimensions else temper(1.0)
        return plain / factor * ramp + plain * (1 - ramp), stretch


def read_ropes(raw: Mapping[str, Any], family: "Family") -> dict[str, Rope]:
    """The rotary positions of each kind of block; one entry, `full_attention`, where all blocks have the same.

    Empty for families without rotary positions.

    Raises:
        CheckpointError: when the file contradicts itself, or has values that dispc does not understand.
    """
    if not family.rotary:
        return {}
    nested = _nested(raw)
    if family.local_rope_theta is None:
        if nested:
            raise CheckpointError(f"rope_parameters has {', '.join(nested)}; {family.model_type} has one kind of block")
        return {FULL: _rope(raw, [raw.get(key) for key in SCALING], family, family.rope_theta)}
    if nested and set(nested) != {FULL, SLIDING}:
        raise CheckpointError(f"rope_parameters names {', '.join(nested)}; {FULL} and {SLIDING} are expected")
    if raw.get("rope_parameters") is not None and not nested:
        raise CheckpointError(f"rope_parameters has no {FULL} and {SLIDING}, which {family.model_type} models look for")
    flat = [raw.get("rope_scaling")]
    full = _rope(raw, [*flat, nested.get(FULL)], family, family.rope_theta)
    only_local = {THETA[0]: raw[LOCAL_THETA]} if raw.get(LOCAL_THETA) is not None else {}
    return {FULL: full, SLIDING: _rope(only_local, [nested.get(SLIDING)], family, family.local_rope_theta)}


def _nested(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters` where it has an entry for each kind of block, else nothing."""
    given = raw.get("rope_parameters")
    if not isinstance(given, Mapping) or not any(isinstance(value, Mapping) for value in given.values()):
        return {}
    return given


def _rope(raw: Mapping[str, Any], given: Iterable[Any], family: "Family", theta: float) -> Rope:
    """The rotary positions that the top level of the file and the objects in `given` agree on."""
    sources = [_object(value) for value in given if value is not None]
    limit, everything = raw.get("max_position_embeddings"), [raw, *sources]
    scalings = [{k: v for k, v in source.items() if k not in (*THETA, *SHARE)} for source in sources]
    scaling = _one_scaling([_scaling(one, limit) for one in scalings])
    for name in (*THETA, *SHARE):
        holders = sum(name in source for source in sources)
        if name not in raw and 0 < holders < len(sources):
            raise CheckpointError(
                f"{name} stands in one of {' and '.join(SCALING)}, and transformers reads the other alone; remove that"
            )
    return Rope(
        theta=_number(_agreed(everything, THETA, theta), THETA[0]),
        share=_share(_agreed(everything, SHARE, family.rotary_share), family),
        scaling=scaling,
    )


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"rotary parameters are {value!r}; an object is expected")
    return value


def _agreed(sources: Iterable[Mapping[str, Any]], names: Iterable[str], default: float) -> Any:
    """The value that the sources have under one of `names`."""
    given = [(name, source[name]) for source in sources for name in names if source.get(name) is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise CheckpointError(f"{given[0][0]} is {given[0][1]!r} and also {value!r} ({name}); remove the wrong one")
    return given[0][1] if given else default


MOST = 1e12
"""Larger than any number of rotary positions: products of some of them overflow."""


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST:
        raise CheckpointError(f"{name} is {value!r}; a number above 0, up to {MOST:g}, is expected")
    return value


def _share(value: Any, family: "Family") -> float:
    share = _number(value, SHARE[0])
    if share > 1 or (share != 1 and not family.has_rotary_share):
        raise CheckpointError(f"{SHARE[0]} is {value!r}; {family.model_type} models rotate whole heads")
    return share


def _scaling(given: Mapping[str, Any], limit: Any) -> dict[str, Any]:
    """One object without its `type` (the old name of `rope_type`), nulls and what follows from the rest."""
    given = {name: value for name, value in given.items() if value is not None}
    if (both := [given[name] for name in ("rope_type", "type") if name in given])[1:] and both[0] != both[1]:
        raise CheckpointError(f"rope_type of a rotary scaling is {both[0]!r}, and its type {both[1]!r}; remove one")
    kind = given.pop("rope_type", given.get("type", "default"))
    given.pop("type", None)
    if not isinstance(kind, str) or kind not in TYPES:
        raise CheckpointError(f"rotary scaling {kind!r} is not one of {', '.join(TYPES)}")
    needed, optional = TYPES[kind]
    if kind in ("yarn", "llama3") and limit is not None:
        given.setdefault("original_max_position_embeddings", limit)
    for name in needed:
        if name not in given:
            raise CheckpointError(f"rotary scaling {kind} has no {name}")
    for name, value in given.items():
        if name not in needed + optional:
            raise CheckpointError(f"rotary scaling {kind} has {name} = {value!r}, whose meaning dispc does not know")
        if name != "truncate":
            _number(value, f"{name} of rotary scaling {kind}")
        elif not isinstance(value, bool):
            raise CheckpointError(f"truncate of rotary scaling {kind} is {value!r}; true or false is expected")
    if kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        raise CheckpointError("high_freq_factor of rotary scaling llama3 is not larger than its low_freq_factor")
    return {"rope_type": kind, **given}


def _one_scaling(scalings: list[dict[str, Any]]) -> dict[str, Any]:
    for other in scalings[1:]:
        if other != scalings[0]:
            raise CheckpointError(f"{' and '.join(SCALING)} contradict each other; remove the wrong one")
    return scalings[0] if scalings else {"rope_type": "default"}


def unreached_positions(ropes: Mapping[str, Rope], positions: int) -> str | None:
    """A note when YaRN reaches further than the `positions` that the config allows; None when it does not.

    Model cards explain how to add the scaling, and `max_position_embeddings` is easily left as it was.
    """
    for scaling in (rope.scaling for rope in ropes.values() if rope.scaling["rope_type"] == "yarn"):
        original = int(scaling["original_max_position_embeddings"])
        if (reach := int(original * scaling["factor"])) > positions:
            return (
                f"YaRN reaches {reach:,} positions, but max_position_embeddings is {positions:,}: the artifact ends "
                f"there; for all of them set it to {reach}, and original_max_position_embeddings of the scaling to "
                f"{original}"
            )
    return None


def spell_ropes(ropes: Mapping[str, Rope], parameters: Iterable[str], family: "Family") -> dict[str, Any]:
    """The same as keyword arguments for a config class that has these `parameters`, of either release."""
    known = set(parameters)
    if not ropes:
        return {}
    if "rope_parameters" in known:
        objects = {kind: _release5(rope, family) for kind, rope in ropes.items()}
        return {"rope_parameters": objects if len(objects) > 1 else objects[FULL]}
    full = ropes[FULL]
    scaling = None if full.scaling["rope_type"] == "default" else dict(full.scaling)
    spelled: dict[str, Any] = {next((name for name in THETA if name in known), THETA[0]): full.theta}
    spelled |= {name: full.share for name in SHARE if name in known}
    spelled["rope_scaling"] = scaling
    if SLIDING in ropes:
        if ropes[SLIDING].scaling["rope_type"] != "default":
            raise CheckpointError(f"rotary scaling of {SLIDING} blocks is unknown to this release of transformers")
        spelled[LOCAL_THETA] = ropes[SLIDING].theta
    return spelled


def _release5(rope: Rope, family: "Family") -> dict[str, Any]:
    share = {SHARE[0]: rope.share} if family.has_rotary_share else {}
    return {"rope_theta": rope.theta, **share, **rope.scaling}


def check_ropes(module: "nn.Module", ropes: Mapping[str, Rope], head_dim: int, unused: Collection[str] = ()) -> None:
    """Make sure that the rotary modules in `module`, built by transformers, rotate at the frequencies of `ropes`.

    Kinds that no block is of are `unused`: they may be missing.

    Raises:
        CheckpointError: when one does not, or one of `ropes` is in no module.
    """
    wanted = {kind: rope.frequencies(head_dim) for kind, rope in ropes.items()}
    met: set[str] = set()
    for part in module.modules():
        if not type(part).__name__.endswith("RotaryEmbedding"):
            continue
        for name, buffer in part.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original" in name:
                continue
            stretch = getattr(part, name.replace("inv_freq", "attention_scaling"), 1.0)
            kinds = {kind for kind, rope in wanted.items() if _same(buffer.double().cpu().numpy(), stretch, *rope)}
            if not kinds:
                raise CheckpointError(
                    "the rotary positions that the installed transformers makes of it are not those that it says; "
                    "please report this with the config.json and the version of transformers"
                )
            met |= kinds
    if not set(wanted) - set(unused) <= met:
        raise CheckpointError("the installed transformers makes no rotary positions of what it says of them")


def _same(found: npt.NDArray[np.float64], stretch: float, wanted: npt.NDArray[np.float64], factor: float) -> bool:
    return (  # where llama3's factors are 1 % apart, their ramp makes 1e-4 of what float32 rounds
        found.shape == wanted.shape
        and bool(np.allclose(found, wanted, rtol=1e-4, atol=0))
        and math.isclose(stretch, factor, rel_tol=1e-6)
    )
