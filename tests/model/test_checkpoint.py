"""Checkpoints as lazy tensors: all formats give the same values, nothing is executed, damage is an error."""

import json
import pickle
import resource
import struct
from pathlib import Path
from typing import Any

import harness
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dispc.model.checkpoint import Checkpoint
from dispc.support.errors import CheckpointError, DispcError, UnsupportedModelError

FORMATS = ("safetensors", "sharded safetensors", "torch", "sharded torch")


def store(state: dict[str, torch.Tensor], directory: Path, kind: str) -> Checkpoint:
    """A llama directory whose weights are `state`, written in one of FORMATS."""
    directory.mkdir()
    (directory / "config.json").write_text((harness.checkpoint("llama").directory / "config.json").read_text())
    save, stem, suffix = (
        (torch.save, "pytorch_model", "bin") if "torch" in kind else (save_file, "model", "safetensors")
    )
    if "sharded" not in kind:
        save(state, directory / f"{stem}.{suffix}")
        return Checkpoint(directory)
    names = sorted(state)
    shards = {f"{stem}-{i}.{suffix}": names[i::3] for i in range(3)}
    for shard, held in shards.items():
        save({name: state[name] for name in held}, directory / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return Checkpoint(directory)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return load_file(harness.checkpoint("llama").directory / "model.safetensors")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_holds_the_same_tensors(kind: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    checkpoint = store(state, tmp_path / "model", kind)
    assert set(checkpoint.tensors) == set(state)
    for name, value in state.items():
        tensor = checkpoint.find(name)
        assert (tensor.name, tensor.shape, tensor.dtype) == (name, tuple(value.shape), value.dtype)
        assert torch.equal(tensor.read(), value)
        assert tensor.file.is_file()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_stored_dtypes_are_kept(kind: str, dtype: torch.dtype, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    checkpoint = store({name: value.to(dtype) for name, value in state.items()}, tmp_path / "model", kind)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {dtype}
    assert checkpoint.find("lm_head.weight").read().dtype == dtype


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_weight_in_a_dtype_that_dispc_does_not_read_is_refused(
    kind: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    packed = {"model.norm.weight": torch.zeros(48, dtype=torch.float8_e4m3fn)}
    checkpoint = store(state | packed, tmp_path / "model", kind)
    assert set(checkpoint.tensors) == set(state) - set(packed)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as"):
        checkpoint.find("model.norm.weight")


def test_listing_reads_headers_and_no_values(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    elements = 2**28  # 1 GiB in a file without blocks on the disk
    header = json.dumps({"w": {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}}).encode()
    checkpoint = store({}, tmp_path / "model", "safetensors")
    with open(tmp_path / "model" / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * elements)
    before = resident()
    assert checkpoint.tensors["w"].shape == (elements,)
    assert resident() - before < 2**28


def test_the_bare_base_model_is_found_under_the_full_names(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): value for name, value in state.items()}
    checkpoint = store(bare, tmp_path / "model", "safetensors")
    for name, value in state.items():
        assert torch.equal(checkpoint.find(name).read(), value)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_every_parameter_of_the_model_is_found_with_its_value(variant: str) -> None:
    checkpoint = harness.checkpoint(variant)
    for name, parameter in harness._dense_reference(variant).named_parameters(remove_duplicate=False):
        assert torch.equal(checkpoint.find(name).expect(tuple(parameter.shape)).read(), parameter)


def test_a_tied_head_is_the_embedding() -> None:
    checkpoint = harness.checkpoint("llama-tied-biased")
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.find("lm_head.weight") is checkpoint.find("model.embed_tokens.weight")


def test_a_shard_may_be_a_link_as_in_the_cache_of_the_hub(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    checkpoint = store(state, tmp_path / "model", "sharded safetensors")
    blob = tmp_path / "blob"
    (tmp_path / "model" / "model-1.safetensors").rename(blob)
    (tmp_path / "model" / "model-1.safetensors").symlink_to(blob)
    assert set(checkpoint.tensors) == set(state)


def test_a_single_file_counts_before_the_index_of_an_older_save(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """As in transformers, which leaves the index behind when it saves the model again as one file."""
    checkpoint = store(state, tmp_path / "model", "sharded safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "model" / "model.safetensors")
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(tensor.read(), state[name] + 1)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/tmp/outside.safetensors", "sub/../../outside", "..", ""])
def test_an_index_cannot_name_a_file_outside_the_directory(
    shard: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    checkpoint = store(state, tmp_path / "model", "sharded safetensors")
    save_file(state, tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(state, shard)}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"outside|missing"):
        _ = checkpoint.tensors


class Payload:
    """Pickled, it creates a file when it is loaded by a loader that executes pickles."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protect", [True, False])
def test_a_malicious_pickle_is_refused_and_not_executed(protect: bool, tmp_path: Path) -> None:
    store({}, tmp_path / "model", "torch")
    state, path = {"lm_head.weight": Payload(tmp_path / "executed")}, tmp_path / "model" / "pytorch_model.bin"
    torch.save(state, path)
    if not protect:  # the payload does harm where it can
        torch.load(path, weights_only=False)
        assert (tmp_path / "executed").exists()
        return
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a torch file that can be loaded safely"):
        _ = Checkpoint(tmp_path / "model").tensors
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"junk" * 100, pickle.dumps({"a": 1}), pickle.dumps(Payload(Path("x")))])
def test_a_bin_that_torch_did_not_write_is_refused(content: bytes, tmp_path: Path) -> None:
    store({}, tmp_path / "model", "torch")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: "):
        _ = Checkpoint(tmp_path / "model").tensors


def test_code_that_lies_in_the_directory_is_never_run(tmp_path: Path) -> None:
    model = tiny.make_model("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass AutoConfig: pass\n")
    assert Checkpoint(model).config == harness.checkpoint("llama").config
    assert not (tmp_path / "executed").exists()


@given(st.data())
@settings(max_examples=60)
def test_a_damaged_weight_file_is_an_error_and_never_a_crash(data: st.DataObject) -> None:
    """Cut it anywhere, or change bytes of the header: listing either works or raises CheckpointError."""
    whole = (harness.checkpoint("llama").directory / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    directory = harness.scratch() / "damaged"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    content = bytearray(whole)
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (directory / "model.safetensors").write_bytes(content)
    try:
        tensors = Checkpoint(directory).tensors
        assert len(content) == len(whole)  # what is cut short is always noticed
        for tensor in tensors.values():
            tensor.read()
    except CheckpointError as error:
        assert str(directory / "model.safetensors") in str(error)
        assert len(str(error).splitlines()) == 1


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.none(), max_size=2)
)
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
KEYS = (*SIZES, "ffn_dim", "tie_word_embeddings", "layer_types", "rms_norm_eps", "rope_scaling", "dtype")


@pytest.mark.parametrize("variant", ["llama", "qwen3", "phi", "opt"])
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
@settings(max_examples=60)
def test_a_config_of_nonsense_is_an_error_that_names_the_file(variant: str, changes: dict[str, Any]) -> None:
    directory = harness.scratch() / f"nonsense-{variant}"
    directory.mkdir(exist_ok=True)
    raw = json.loads((harness.checkpoint(variant).directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | changes))
    try:
        config = Checkpoint(directory).config
        for size in SIZES:
            value = getattr(config, size.replace("max_position_embeddings", "max_positions"))
            assert type(value) is int and value > 0
        assert config.num_attention_heads % config.num_key_value_heads == 0
        assert len(config.layer_kinds) == config.num_hidden_layers
    except UnsupportedModelError:
        pass
    except DispcError as error:
        assert str(directory / "config.json") in str(error)
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("generation", "raw", "expected"),
    [
        ({"eos_token_id": [5, 6]}, 2, [5, 6]),
        ({"eos_token_id": 0}, 2, [0]),
        ({}, 2, [2]),
        ({}, None, []),
        (None, 3, [3]),
    ],
)
def test_stop_tokens_come_from_the_generation_config_and_else_from_the_config(
    generation: dict[str, Any] | None, raw: int | None, expected: list[int], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": raw}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert Checkpoint(tmp_path).stop_tokens == expected
