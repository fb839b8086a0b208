"""The files beside model.onnx: config, tokenizer, and genai_config.json for onnxruntime-genai."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dispc.manifest import COPIED
from dispc.model.checkpoint import Checkpoint
from dispc.plan import Plan
from dispc.support.errors import CheckpointError
from dispc.support.files import write_json
from dispc.support.inputs import contents


def write_companions(
    checkpoint: Checkpoint,
    plan: Plan,
    cache_layers: int,
    inputs: Sequence[str],
    provider_options: list[dict[str, Any]],
    directory: Path,
) -> None:
    """Copy the model's config and tokenizer files, and write genai_config.json.

    `inputs` are the names of the graph's inputs, `provider_options` what onnxruntime-genai opens its session with.
    """
    for name in COPIED:
        if (checkpoint.directory / name).exists():
            (directory / name).write_bytes(contents(checkpoint.directory / name, CheckpointError))
    write_json(directory / "genai_config.json", genai_config(checkpoint, plan, cache_layers, inputs, provider_options))


def genai_config(
    checkpoint: Checkpoint, plan: Plan, cache_layers: int, inputs: Sequence[str], provider_options: list[dict[str, Any]]
) -> dict[str, Any]:
    """The genai_config.json of onnxruntime-genai, which refuses keys that it does not know.

    `num_hidden_layers` there counts the key/value caches: an attention that was pruned away has none. Token ids that
    the model does not name are left out, since runtimes disagree about invented ones; padding falls back to the
    first stop token.
    """
    config = checkpoint.config
    generation = checkpoint.generation
    eos, pad = generation.stops, generation.pad
    if pad is None and eos:  # not `or`: id 0 is a token like any other
        pad = eos[0]
    ids = {"bos_token_id": generation.bos, "eos_token_id": eos or None, "pad_token_id": pad}
    named = {name: name for name in inputs if not name.startswith("past_key_values.")}
    caches = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    presents = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    return {
        "model": {
            "type": "decoder",
            **{name: number for name, number in ids.items() if number is not None},
            "context_length": config.max_positions,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": provider_options},
                "filename": "model.onnx",
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": cache_layers,
                "num_key_value_heads": config.num_key_value_heads,
                "inputs": named | caches,
                "outputs": {"logits": "logits"} | presents,
            },
        },
        "search": {
            "do_sample": generation.do_sample,
            "max_length": config.max_positions,
            "past_present_share_buffer": plan.group_query and plan.padding == "right",
            "temperature": generation.temperature,
            "top_k": generation.top_k,
            "top_p": generation.top_p,
            **generation.penalties,
        },
    }
