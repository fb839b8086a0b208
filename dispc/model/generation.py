"""How a model's text is meant to be made: generation_config.json, and config.json where that says nothing."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dispc.support.errors import CheckpointError

PENALTIES: dict[str, tuple[type, float, float]] = {
    "repetition_penalty": (float, 1.0, 1e-6),
    "no_repeat_ngram_size": (int, 0, 0),
    "min_length": (int, 0, 0),
}
"""What onnxruntime-genai knows besides, by the same names: kind, the value that changes nothing, and the least."""
CARRIED = re.compile(
    r"(eos|bos|pad|decoder_start)_token_id|do_sample|temperature|top_k|top_p|max_length|max_new_tokens"
    r"|transformers_version|_\w+|output_\w+|return_\w+|use_cache|cache_\w+|\w*compile\w*|trust_remote_code"
)
"""Keys of generation_config.json that are carried over, or change no token."""
NOTHING: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "remove_invalid_values": False,
    "early_stopping": False,
    "renormalize_logits": False,
}
"""Values of other keys that switch nothing on."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Token ids and sampling, checked; ids that neither file names are None, and `stops` is then empty.

    `penalties` has those of `PENALTIES` that change something. `left_out` are the keys of generation_config.json that
    change tokens and that no runtime is told.
    """

    stops: list[int]
    bos: int | None
    pad: int | None
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    penalties: Mapping[str, float]
    left_out: tuple[str, ...]

    @staticmethod
    def of(generation: Mapping[str, Any], raw: Mapping[str, Any], vocabulary: int) -> "Generation":
        """Read both files; `vocabulary` is the number of token ids. A top_k of 0 means all tokens, here too.

        Raises:
            CheckpointError: for an id that is no token, or a figure that is no number.
        """

        def ids(key: str) -> list[int]:
            value = generation.get(key, raw.get(key))
            listed = value if isinstance(value, list) else [] if value is None else [value]
            for value in listed:
                if type(value) is not int or not 0 <= value < vocabulary:
                    raise CheckpointError(f"{key} is {value!r}; ids from 0 to {vocabulary - 1} are expected")
            return listed

        def one(key: str) -> int | None:
            if generation.get(key, raw.get(key)) == -1:  # LLaMA's first configs: none
                return None
            return next(iter(ids(key)), None)

        def figure(key: str, default: float, least: float, most: float = 1e9, kind: type = float) -> float:
            value = generation.get(key)
            if value is None:
                return default
            allowed = int if kind is int else int | float
            if isinstance(value, bool) or not isinstance(value, allowed) or not least <= value <= most:
                what = "a whole number" if kind is int else "a number"
                raise CheckpointError(f"{key} is {value!r}; {what} from {least:g} to {most:g} is expected")
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
            top_k=int(figure("top_k", 50, 0, kind=int)),
            top_p=float(figure("top_p", 1.0, 0.0, 1.0) or 1.0),
            penalties={
                key: value
                for key, (kind, nothing, least) in PENALTIES.items()
                if (value := figure(key, nothing, least, kind=kind)) != nothing
            },
            left_out=tuple(
                key
                for key, value in generation.items()
                if not CARRIED.fullmatch(key) and key not in PENALTIES and value not in (None, [], {}, NOTHING.get(key))
            ),
        )
