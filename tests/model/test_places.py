"""Nothing that a model directory holds is left out in silence: every tensor has a place, or is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import harness
import pytest
import tiny
import torch
from command import assert_refused
from safetensors.torch import load_file, save_file

from dispc.export.trace import export_program
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.generation import KEYS
from dispc.support.errors import CheckpointError

Tensors = dict[str, torch.Tensor]


def model_with(variant: str, tensors: Tensors, directory: Path, **config: Any) -> Checkpoint:
    """A directory of `variant` whose weights are `tensors`."""
    directory.mkdir()
    raw = json.loads((harness.checkpoint(variant).directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(raw))
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "model.safetensors")
    return Checkpoint(directory)


def tensors_of(variant: str) -> Tensors:
    return load_file(harness.checkpoint(variant).directory / "model.safetensors")


def read_both_ways(checkpoint: Checkpoint) -> None:
    """As the compiler reads a checkpoint, and as the reference does."""
    with pytest.raises(CheckpointError) as compiled:
        export_program(checkpoint, torch.float32)
    with pytest.raises(CheckpointError) as built:
        checkpoint.load_model(torch.float32)
    assert str(compiled.value) == str(built.value)
    raise built.value


STRANGERS: dict[str, Tensors] = {
    "model.layers.0.self_attn.o_proj.bias": {},
    "model.layers.2.mlp.down_proj.bias": {},
    "model.layers.3.mlp.down_proj.weight": {},
    "model.layers.0.self_attn.q_proj.lora_A.weight": {},
    "score.weight": {},
    "value_head.summary.bias": {},
    "packed": {"packed": torch.zeros(3, dtype=torch.int8)},
    "model.layers.0.mlp.up_proj.weight_scale": {
        "model.layers.0.mlp.up_proj.weight_scale": torch.ones(1, dtype=torch.float8_e4m3fn)
    },
    "norm.weight": {},  # once more under the name of the bare base model
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_tensor_without_a_place_is_refused_by_name(name: str, tmp_path: Path) -> None:
    more = STRANGERS[name] or {name: torch.ones(48)}
    with pytest.raises(CheckpointError, match=f"tensor {name} has no place"):
        read_both_ways(model_with("llama", tensors_of("llama") | more, tmp_path / "model"))


def test_the_command_names_a_bias_that_the_config_does_not_declare(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.bias"
    checkpoint = model_with("llama", tensors_of("llama") | {name: torch.ones(48)}, tmp_path / "model")
    Masks.dense(checkpoint.config).save(tmp_path / "model" / "masks.safetensors", checkpoint.config)
    out = tmp_path / "out"
    assert_refused(tmp_path, "compile", checkpoint.directory, "-t", "onnx-cpu", "-o", out, says=(name, "no place"))


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_every_tensor_that_transformers_saves_has_a_place(variant: str) -> None:
    export_program(harness.checkpoint(variant), torch.float32)
    harness.checkpoint(variant).load_model(torch.float32)


def test_what_old_releases_stored_and_nobody_reads_is_left_aside(tmp_path: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "position_ids": torch.arange(3)}
    checkpoint = model_with("llama", tensors_of("llama") | old, tmp_path / "model")
    checkpoint.load_model(torch.float32)
    export_program(checkpoint, torch.float32)


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight", "both", "embed_tokens.weight"])
def test_a_tied_model_is_complete_with_either_name_or_with_both(stored: str, tmp_path: Path) -> None:
    tensors = tensors_of("llama-tied-biased")
    words = tensors.pop("model.embed_tokens.weight")
    names = ("model.embed_tokens.weight", "lm_head.weight") if stored == "both" else (stored,)
    checkpoint = model_with("llama-tied-biased", tensors | {name: words.clone() for name in names}, tmp_path / "model")
    model = checkpoint.load_model(torch.float32)
    assert torch.equal(model.lm_head.weight, words) and model.lm_head.weight is model.model.embed_tokens.weight
    export_program(checkpoint, torch.float32)


def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of("llama-tied-biased")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1e-6}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not the embedding"):
        read_both_ways(model_with("llama-tied-biased", tensors | head, tmp_path / "model"))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_must_be_merged_first(name: str, tmp_path: Path) -> None:
    checkpoint = model_with("llama", tensors_of("llama"), tmp_path / "model")
    (checkpoint.directory / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="merge it first"):
        read_both_ways(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "lora.safetensors",
        "model-00002-of-00002.safetensors",
        "value_head.safetensors",
        "non_lora_trainables.bin",
        "mm_projector.bin",
        "adapter_model.pt",
        "head.pth",
        "tables.npz",
    ],
)
def test_a_file_of_weights_that_is_not_read_is_refused(name: str, tmp_path: Path) -> None:
    checkpoint = model_with("llama", tensors_of("llama"), tmp_path / "model")
    save_file({"x": torch.ones(1)}, checkpoint.directory / name)
    with pytest.raises(CheckpointError, match=name):
        read_both_ways(checkpoint)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Which of them is meant depends on who reads."""
    tensors, name = tensors_of("llama"), "model.norm.weight"
    checkpoint = model_with("llama", tensors, tmp_path / "model")
    (checkpoint.directory / "model.safetensors").unlink()
    shards = {
        "model-00001-of-00002.safetensors": tensors,
        "model-00002-of-00002.safetensors": {name: tensors[name] + 1},
    }
    for shard, part in shards.items():
        save_file(part, checkpoint.directory / shard)
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {name: list(shards)[1]}}
    (checkpoint.directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"holds tensor {name}, which another shard holds too"):
        read_both_ways(Checkpoint(checkpoint.directory))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """Parsers differ in which of them they take."""
    checkpoint = model_with("llama", tensors_of("llama"), tmp_path / "model")
    config = checkpoint.directory / "config.json"
    config.write_text(config.read_text().rstrip().removesuffix("}") + ', "rms_norm_eps": 0.1}')
    with pytest.raises(CheckpointError, match="the key rms_norm_eps stands there twice"):
        Checkpoint(checkpoint.directory)


def test_what_generation_config_asks_for_is_carried_over_or_told(tmp_path: Path) -> None:
    checkpoint = model_with("llama", tensors_of("llama"), tmp_path / "model")
    told = {"repetition_penalty": 1.1, "min_length": 0, "suppress_tokens": [3], "num_beams": 1, "bad_words_ids": []}
    (checkpoint.directory / "generation_config.json").write_text(json.dumps(told))
    (checkpoint.directory / "style").mkdir()
    (checkpoint.directory / "style" / "adapter_config.json").write_text("{}")
    assert dict(checkpoint.generation.penalties) == {"repetition_penalty": 1.1}
    sampling, adapter = checkpoint.notes
    assert "suppress_tokens" in sampling and "num_beams" not in sampling and "style" in adapter


def edited(directory: Path, name: str, **changes: Any) -> Checkpoint:
    """The model directory with other values in one of its JSON files, which may not exist yet."""
    path = directory / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    return Checkpoint(directory)


def test_generation_keys_of_config_json_count_where_there_is_no_generation_config(tmp_path: Path) -> None:
    """As in transformers, which reads one of the two files."""
    directory = model_with("llama", tensors_of("llama"), tmp_path / "model").directory
    (directory / "generation_config.json").unlink(missing_ok=True)
    asked = {"do_sample": True, "temperature": 0.5, "top_k": 3, "repetition_penalty": 1.2, "suppress_tokens": [3]}
    legacy = {
        "num_beams": 1,
        "encoder_no_repeat_ngram_size": 0,
        "max_length": 20,
        "typical_p": 1.0,
        "bad_words_ids": None,
    }
    checkpoint = edited(directory, "config.json", **asked, **legacy)
    generation = checkpoint.generation
    assert (generation.do_sample, generation.temperature, generation.top_k) == (True, 0.5, 3)
    assert dict(generation.penalties) == {"repetition_penalty": 1.2}
    assert generation.left_out == ("suppress_tokens",) and not generation.overruled
    (note,) = checkpoint.notes
    assert "config.json sets suppress_tokens, which genai_config.json cannot say" in note

    checkpoint = edited(directory, "generation_config.json", temperature=0.7)
    generation = checkpoint.generation
    assert (generation.do_sample, generation.temperature, dict(generation.penalties)) == (False, 0.7, {})
    (note,) = checkpoint.notes
    assert "config.json sets do_sample, top_k, repetition_penalty, suppress_tokens, which is left out" in note
    with pytest.raises(CheckpointError, match="config.json: temperature is 'warm'"):
        (directory / "generation_config.json").unlink()
        _ = edited(directory, "config.json", temperature="warm").generation


def test_every_key_of_transformers_generation_config_is_known_in_config_json() -> None:
    from transformers import GenerationConfig

    elsewhere = re.compile(
        r"_\w+|(eos|bos|pad|decoder_start)_token_id|use_\w+|cache_\w+|compile_config|continuous_batching_config"
        r"|speculation_type|transformers_version|output_\w+|return_\w+|max_cache_len"
    )
    strange = [key for key in vars(GenerationConfig()) if not KEYS.fullmatch(key) and not elsewhere.fullmatch(key)]
    assert not strange


@pytest.mark.parametrize(
    ("said", "noted"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, None),
        ({"architectures": ["MyLlama", "LlamaForCausalLM"]}, None),
        ({"architectures": None}, None),
        ({"architectures": ["LlamaForSequenceClassification"]}, "it is a LlamaForSequenceClassification"),
        ({"architectures": "MyLlama"}, "it is a MyLlama"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.MyLlama"}}, "which is not run"),
    ],
)
def test_another_class_or_code_is_noted(said: dict[str, Any], noted: str | None, tmp_path: Path) -> None:
    directory = model_with("llama", tensors_of("llama"), tmp_path / "model").directory
    notes = edited(directory, "config.json", **said).notes
    assert [noted in note for note in notes] == [True] if noted else notes == []


def test_a_head_of_another_kind_has_no_place(tmp_path: Path) -> None:
    """A classifier of a tied model has all that a language model needs, and more."""
    state = tensors_of("llama")
    checkpoint = model_with("llama", state | {"score.weight": torch.ones(2, 48)}, tmp_path / "model")
    checkpoint = edited(checkpoint.directory, "config.json", architectures=["LlamaForSequenceClassification"])
    with pytest.raises(CheckpointError, match=r"tensor score\.weight has no place"):
        checkpoint.load_model(torch.float32)


def test_masks_and_copies_for_other_programs_may_lie_beside(tmp_path: Path) -> None:
    checkpoint = model_with("llama", tensors_of("llama"), tmp_path / "model")
    for name in ("training_args.bin", "optimizer.pt", "model.gguf", "rng_state.pth"):
        (checkpoint.directory / name).touch()
    for name in ("masks.safetensors", "masks-30.safetensors"):
        Masks.dense(checkpoint.config).save(checkpoint.directory / name, checkpoint.config)
    save_file({"x": torch.ones(1)}, checkpoint.directory / "consolidated.safetensors")
    torch.save({"x": torch.ones(1)}, checkpoint.directory / "pytorch_model.bin")
    checkpoint.load_model(torch.float32)
