"""How a model's text is meant to be made: generation_config.json, and config.json where that says nothing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dispc.support.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Token ids and sampling, checked; ids that are not told are None, and `stops` is empty then."""

    stops: list[int]
    bos: int | None
    pad: int | None
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float

    @staticmethod
    def of(generation: Mapping[str, Any], raw: Mapping[str, Any], vocabulary: int) -> "Generation":
        """Read both files of a model with so many words. A top_k of 0 is "all tokens", here and for runtimes.

        Raises:
            CheckpointError: for an id that is no word, or a figure that is none.
        """

        def ids(key: str) -> list[int]:
            told = generation.get(key, raw.get(key))
            listed = told if isinstance(told, list) else [] if told is None else [told]
            for value in listed:
                if type(value) is not int or not 0 <= value < vocabulary:
                    raise CheckpointError(f"{key} is {told!r}; ids from 0 to {vocabulary - 1} are expected")
            return listed

        def one(key: str) -> int | None:
            if generation.get(key, raw.get(key)) == -1:  # LLaMA's first configs: none
                return None
            return next(iter(ids(key)), None)

        def figure(key: str, default: float, least: float) -> float:
            value = generation.get(key)
            if value is None:
                return default
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
                raise CheckpointError(f"{key} is {value!r}; a number from {least:g} is expected")
            return value

        do_sample = generation.get("do_sample")
        if do_sample is not None and not isinstance(do_sample, bool):
            raise CheckpointError(f"do_sample is {do_sample!r}; true or false is expected")
        return Generation(
            stops=ids("eos_token_id"),
            bos=one("bos_token_id"),
            pad=one("pad_token_id"),
            do_sample=bool(do_sample),
            temperature=float(figure("temperature", 1.0, 0.0) or 1.0),
            top_k=int(figure("top_k", 50, 0)),
            top_p=float(figure("top_p", 1.0, 0.0) or 1.0),
        )
