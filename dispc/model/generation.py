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
SAMPLING: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""What is carried over, by the same names, and transformers' defaults."""
CARRIED = re.compile(
    r"(eos|bos|pad|decoder_start)_token_id|do_sample|temperature|top_k|top_p"
    r"|transformers_version|_\w+|output_\w+|return_\w+|use_cache|cache_\w+|\w*compile\w*|trust_remote_code"
    r"|\w*assistant\w*|\w+_lookbehind"
)
"""Keys of generation_config.json that are carried over, or change no token."""
KEYS = re.compile(
    r"do_sample|temperature|top_[khp]|min_p|typical_p|epsilon_cutoff|eta_cutoff|max_length|min_length|max_new_tokens"
    r"|min_new_tokens|max_time|stop_strings|num_beams|num_beam_groups|diversity_penalty|length_penalty|early_stopping"
    r"|num_return_sequences|(encoder_)?repetition_penalty|(encoder_)?no_repeat_ngram_size|penalty_alpha|dola_layers"
    r"|guidance_scale|low_memory|constraints|force_words_ids|bad_words_ids|(begin_)?suppress_tokens|sequence_bias"
    r"|exponential_decay_length_penalty|forced_[be]os_token_id|remove_invalid_values|renormalize_logits|token_healing"
    r"|watermarking_config|output_scores|output_logits|return_dict_in_generate|prefill_chunk_size|disable_compile"
    r"|prompt_lookup_num_tokens|max_matching_ngram_size|\w*assistant\w*|\w+_lookbehind"
)
"""Keys of generation that config.json may hold. transformers reads them there where no generation_config.json is."""
NOTHING: dict[str, Any] = SAMPLING | {
    "encoder_no_repeat_ngram_size": 0,
    "max_length": 20,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
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
    "low_memory": False,
    "token_healing": False,
}
"""Values of other keys that switch nothing on."""
ENDS = ("max_length", "max_new_tokens")
"""Tokens after which generation ends: genai_config.json has the model's limit, and applications their own."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Token ids and sampling, checked; ids that neither file names are None, and `stops` is then empty.

    `penalties` has those of `PENALTIES` that change something. `left_out` are the keys that change tokens and that no
    runtime is told; `overruled` those of config.json that transformers does not read beside a generation_config.json.
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
    overruled: tuple[str, ...]

    @staticmethod
    def of(file: Mapping[str, Any] | None, raw: Mapping[str, Any], vocabulary: int) -> "Generation":
        """Read generation_config.json (`file`, None where there is none) and config.json (`raw`), as transformers does.

        Ids that the first lacks are those of the second. `vocabulary` is the number of token ids. A top_k of 0 means
        all tokens, here too; null means 50, as in transformers 5 (in 4 it means all).

        Raises:
            CheckpointError: for an id that is no token, or a figure that is no number.
        """

        legacy = {key: value for key, value in raw.items() if KEYS.fullmatch(key)}
        generation = legacy if file is None else file
        positions = raw.get("max_position_embeddings")
        limit = positions if isinstance(positions, int) else 0

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
        if do_sample and generation.get("temperature") == 0:
            raise CheckpointError(
                "temperature is 0 and do_sample is true; no token is drawn so: set do_sample to false"
            )
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
                if not CARRIED.fullmatch(key) and key not in PENALTIES and _changes(key, value)
                if not (key in ENDS and isinstance(value, int) and value >= limit)
            ),
            overruled=tuple(
                key
                for key, value in legacy.items()
                if file is not None
                and key not in file
                and (key in SAMPLING or not CARRIED.fullmatch(key))
                and _changes(key, value)
            ),
        )


def _changes(key: str, value: Any) -> bool:
    """Whether a value is another than that which changes no token."""
    nothing = PENALTIES[key][1] if key in PENALTIES else NOTHING.get(key)
    return value not in (None, [], {}, nothing)
