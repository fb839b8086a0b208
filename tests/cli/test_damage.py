"""Damaged models, masks and artifacts: one line that says what and where, exit code 2, nothing changed."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import numpy as np
import onnx
import pytest
import tiny
import torch
from command import assert_refused
from desk import Desk
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.families import FAMILIES

# Models


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / "config.json", **changes)


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (model / name).write_bytes(content)

    return damage


def indexed(content: bytes) -> Callable[[Path], None]:
    """Make the weights a shard of an index with that content."""

    def damage(model: Path) -> None:
        (model / "model.safetensors").rename(model / "shard.safetensors")
        (model / SHARD).write_bytes(content)

    return damage


def removed(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def truncated(keep: float) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        content = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(content[: int(len(content) * keep)])

    return damage


def retensored(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        state = load_file(model / "model.safetensors")
        change(state)
        save_file(state, model / "model.safetensors")

    return damage


def with_value(name: str, value: float) -> Callable[[Path], None]:
    return retensored(lambda state: state[name].view(-1).fill_(value))


def sharded(shard: str | None = None, **more: str) -> Callable[[Path], None]:
    """Make the weights one shard after an index that names it, or `shard`, and the tensors in `more` too."""

    def damage(model: Path) -> None:
        (model / "model.safetensors").rename(model / "shard.safetensors")
        names = load_file(model / "shard.safetensors")
        index = {"weight_map": dict.fromkeys(names, shard or "shard.safetensors") | more}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


class Payload:
    """Pickled, it makes a file where a pickle is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def malicious(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(model / "executed")}, model / "pytorch_model.bin")


V_PROJ = "model.layers.1.self_attn.v_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"
SHARD = "model.safetensors.index.json"
DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no model": (shutil.rmtree, ("no such model directory",)),
    "no config": (removed("config.json"), ("config.json", "no such file")),
    "config is not json": (written("config.json", b"{nope"), ("config.json", "not valid JSON")),
    "config is not text": (written("config.json", b"\xff\xfe\x00"), ("config.json", "not valid JSON")),
    "config is a list": (written("config.json", b"[]"), ("config.json", "a JSON object is expected")),
    "config of nonsense": (configured(hidden_size="wide"), ("config.json",)),
    "config without heads": (configured(num_attention_heads=0), ("config.json",)),
    "unknown activation": (configured(hidden_act="softer"), ("config.json", "softer")),
    "unknown family": (configured(model_type="gpt2"), ("config.json", "'gpt2' is not supported", *FAMILIES)),
    "mixture of experts": (configured(model_type="mixtral", num_local_experts=8), ("mixture-of-experts", *FAMILIES)),
    "remote code": (configured(model_type="mine", auto_map={"AutoModel": "m.M"}), ("never runs code", *FAMILIES)),
    "opt-350m": (configured(head_dim=None, model_type="opt", do_layer_norm_before=False), ("OPT-350M", *FAMILIES)),
    "dynamic rope": (configured(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), ("dynamic", *FAMILIES)),
    "longrope": (configured(rope_scaling={"type": "longrope"}), ("longrope", *FAMILIES)),
    "quantised": (configured(quantization_config={"quant_method": "gptq"}), ("already quantised", *FAMILIES)),
    "no weights": (removed("model.safetensors"), ("no model.safetensors",)),
    "empty weights": (truncated(0.0), ("model.safetensors", "truncated or corrupt")),
    "half a header": (truncated(0.001), ("model.safetensors", "truncated or corrupt")),
    "half the weights": (truncated(0.5), ("model.safetensors", "truncated or corrupt")),
    "git lfs pointer": (
        written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("model.safetensors", "Git LFS pointer", "git lfs pull"),
    ),
    "header of nonsense": (
        written("model.safetensors", struct.pack("<Q", 9) + b"not json!" * 9),
        ("model.safetensors", "truncated or corrupt"),
    ),
    "index is not json": (indexed(b"{"), (SHARD, "not valid JSON")),
    "index without a map": (indexed(b"{}"), (SHARD, "no weight_map")),
    "index nested without end": (indexed(b"[" * 100_000), (SHARD, "not valid JSON")),
    "shard one level up": (sharded("../older/model.onnx.data"), (SHARD, "'../older/model.onnx.data'", "outside")),
    "shard by full path": (sharded("/etc/hostname"), (SHARD, "'/etc/hostname'", "outside")),
    "shard missing": (sharded("lost.safetensors"), ("lost.safetensors", "missing", SHARD)),
    "shard without a tensor": (sharded(ghost="shard.safetensors"), (SHARD, "ghost")),
    "tensor missing": (retensored(lambda state: state.pop(V_PROJ)), (V_PROJ, "is missing")),
    "head missing": (retensored(lambda state: state.pop("lm_head.weight")), ("lm_head.weight", "is missing")),
    "tensor of integers": (retensored(lambda state: state.update({V_PROJ: torch.ones(32, 48).int()})), (V_PROJ,)),
    "wrong shape": (
        retensored(lambda state: state.update({V_PROJ: torch.ones(32, 47)})),
        ("model.safetensors", V_PROJ, "[32, 47]", "[32, 48]"),
    ),
    "nan in a large weight": (with_value("lm_head.weight", np.nan), ("model.safetensors", "lm_head.weight", "NaN")),
    "nan in a small weight": (with_value(NORM, np.nan), ("model.safetensors", NORM, "NaN")),
    "infinity": (with_value(V_PROJ, -np.inf), ("model.safetensors", V_PROJ, "infinity")),
    "malicious pickle": (malicious, ("pytorch_model.bin", "safely")),
    "no masks": (removed("masks.safetensors"), ("masks.safetensors", "no such mask file", "--masks")),
    "masks of nonsense": (written("masks.safetensors", b"nope"), ("masks.safetensors", "not a readable safetensors")),
    "weights as masks": (
        lambda model: shutil.copy(model / "model.safetensors", model / "masks.safetensors"),
        ("masks.safetensors", "not a mask file"),
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_compiling_a_damaged_model_says_what_and_where_and_changes_nothing(case: str, desk: Desk) -> None:
    damage, says = DAMAGES[case]
    damage(desk.model)
    desk.refuses("--no-validate", says=says)


@pytest.mark.parametrize("options", [("--verify-each",), ("--dump-ir", "ir")])
def test_a_small_weight_that_is_not_finite_is_named_by_the_options_for_debugging_too(
    options: tuple[str, ...], desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))  # graphs dumped before the error stay, for debugging
    with_value(NORM, np.nan)(desk.model)
    desk.refuses(*options, "--no-validate", says=(NORM, "NaN"))


def test_a_value_too_large_for_float16_is_refused_and_a_wider_dtype_takes_it(desk: Desk) -> None:
    with_value(V_PROJ, 1e6)(desk.model)
    options = ("--target", "onnx-cuda", "--no-validate")
    desk.refuses(*options, says=(V_PROJ, "float16", "wider --dtype"))
    assert desk.compiles(*options, "--dtype", "bfloat16").is_dir()


def test_opt_350m_is_refused(desk: Desk) -> None:
    shutil.rmtree(desk.model)
    tiny.make_model("opt", desk.model)
    edit_json(desk.model / "config.json", word_embed_proj_dim=32)
    desk.refuses("--dense", says=("embedding projections", "OPT-350M"))


# Masks


def remask(model: Path, tensors: dict[str, Any] | None = None, **metadata: str) -> None:
    path = model / "masks.safetensors"
    with safe_open(path, framework="pt") as file:
        entries = file.metadata() | metadata
    save_file(load_file(path) | (tensors or {}), path, entries)


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        ({"blocks.1.mlp.mid": torch.full((88,), 2, dtype=torch.uint8)}, {}, ("blocks.1.mlp.mid", "0 or 1")),
        ({}, {"version": "9"}, ("version 9", "reads 1")),
        ({}, {"norm_scope": "none"}, ("norm_scope 'none'", "full")),
        ({}, {"model_type": "opt"}, ("masks.safetensors", "another model", "model_type is opt", "llama")),
    ],
)
def test_malformed_masks_are_refused(
    tensors: dict[str, Any], metadata: dict[str, str], says: tuple[str, ...], desk: Desk
) -> None:
    remask(desk.model, tensors, **metadata)
    desk.refuses(says=says)


def test_masks_of_another_size_are_refused_with_the_first_difference(desk: Desk) -> None:
    edit_json(desk.model / "config.json", num_hidden_layers=2)
    desk.refuses(says=("the masks belong to another model", "num_hidden_layers is 3, the model has 2"))
    desk.refuses("--masks", desk.place / "lost.safetensors", says=("lost.safetensors", "no such mask file"))


# Artifacts


def spoil_json(**changes: Any) -> Callable[[Desk], None]:
    def damage(desk: Desk) -> None:
        content = json.loads((desk.older / "dispc.json").read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (desk.older / "dispc.json").write_text(json.dumps(kept))

    return damage


def replace_artifact_file(name: str, content: bytes) -> Callable[[Desk], None]:
    return lambda desk: (desk.older / name).write_bytes(content) and None


def halve(name: str) -> Callable[[Desk], None]:
    def damage(desk: Desk) -> None:
        os.truncate(desk.older / name, (desk.older / name).stat().st_size // 2)

    return damage


def other_masks(desk: Desk) -> None:
    config = Checkpoint(desk.model).config
    Masks.random(config, 0.5, 99).save(desk.older / "masks.safetensors", config)


SPOILT: dict[str, tuple[Callable[[Desk], Any], tuple[str, ...]]] = {
    "no artifact": (lambda desk: (desk.older / "dispc.json").unlink(), ("older", "is not an artifact")),
    "no directory": (lambda desk: shutil.rmtree(desk.older), ("older", "is not an artifact")),
    "no model file": (lambda desk: (desk.older / "model.onnx").unlink(), ("model.onnx",)),
    "model file of nonsense": (replace_artifact_file("model.onnx", b"nope"), ("model.onnx", "not an ONNX model")),
    "half a model file": (halve("model.onnx"), ("model.onnx", "not an ONNX model")),
    "half the weights": (halve("model.onnx.data"), ("model.onnx", "cannot load")),
    "no weights": (lambda desk: (desk.older / "model.onnx.data").unlink(), ("model.onnx.data", "no such file")),
    "no masks": (lambda desk: (desk.older / "masks.safetensors").unlink(), ("masks.safetensors", "no such mask file")),
    "other masks": (other_masks, ("masks.safetensors", "is not the file")),
    "manifest is not json": (replace_artifact_file("dispc.json", b"{"), ("dispc.json", "is not valid JSON")),
    "manifest of nonsense": (replace_artifact_file("dispc.json", b"[1]"), ("dispc.json", "a JSON object is expected")),
    "manifest without padding": (spoil_json(padding=None), ("dispc.json", "padding")),
    "manifest without masks": (spoil_json(masks_sha256=None), ("dispc.json", "masks_sha256")),
    "manifest with an empty lowering": (spoil_json(lowering={}), ("dispc.json", "lowering.name")),
    "manifest without counts": (spoil_json(block_parameters=[1]), ("dispc.json", "block_parameters.dense")),
    "manifest with a number for text": (spoil_json(padding=3), ("dispc.json", "padding is missing or malformed")),
    "manifest with text for a number": (spoil_json(positions="many"), ("dispc.json", "positions is missing")),
    "manifest with an odd quantisation": (spoil_json(quantisation={"bits": "4"}), ("dispc.json", "quantisation.bits")),
    "manifest with odd stop tokens": (spoil_json(stop_tokens=[1, None]), ("dispc.json", "stop_tokens[1]")),
    "manifest of another dtype": (spoil_json(dtype="int3"), ("dispc.json", "int3")),
    "other model": (lambda desk: edit_json(desk.model / "config.json", rms_norm_eps=1e-4), ("config.json differs",)),
    "model of another size": (lambda desk: edit_json(desk.model / "config.json", num_hidden_layers=2), ("another",)),
    "no reference": (lambda desk: shutil.rmtree(desk.model), ("model", "no such model directory")),
    "damaged reference": (lambda desk: truncated(0.5)(desk.model), ("model.safetensors", "truncated or corrupt")),
}


@pytest.mark.parametrize("case", SPOILT)
def test_validate_of_a_spoilt_artifact_cannot_run_and_says_why(case: str, desk: Desk) -> None:
    damage, says = SPOILT[case]
    damage(desk)
    assert_refused(desk.place, "validate", desk.older, "-r", desk.model, says=says)


def test_validate_against_other_weights_fails_the_checks(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tiny.make_model("llama", tmp_path_factory.mktemp("other") / "model", seed=1)
    outcome = command.run("validate", desk.older, "-r", other)
    assert outcome.code == 1
    assert "FAIL" in outcome.out


@pytest.mark.parametrize("layer", ["model.layers.0.mlp.down_proj", "lm_head"])
def test_a_single_weight_that_was_tampered_with_fails_validation(layer: str, desk: Desk) -> None:
    graph = onnx.load(desk.older / "model.onnx", load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name.startswith(layer) and tensor.external_data)
    offset = int({entry.key: entry.value for entry in tensor.external_data}["offset"])
    with open(desk.older / "model.onnx.data", "r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<f", 40.0))
    outcome = command.run("validate", desk.older, "-r", desk.model)
    assert outcome.code == 1
    assert "FAILED" in outcome.out
    report = command.run("validate", desk.older, "-r", desk.model, "--json")
    assert report.code == 1
    assert json.loads(report.out)["passed"] is False


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "model.safetensors", "masks.safetensors", "config.json"])
def test_a_file_that_cannot_be_read_is_named_and_not_the_output(name: str, tmp_path: Path) -> None:
    """What a broken disk gives: /proc/self/mem is a regular file that fails where it is read."""
    model = tiny.make_model("llama", tmp_path / "model")
    checkpoint = Checkpoint(model)
    Masks.random(checkpoint.config, 0.3, 1).save(model / "masks.safetensors", checkpoint.config)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("/proc/self/mem")
    outcome = command.run("compile", model, "-t", "onnx-cpu", "-o", tmp_path / "out", "--no-validate")
    assert outcome.code == 2 and outcome.err.startswith(f"error: {model / name}: "), outcome
    assert "written" not in outcome.err and len(outcome.err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
