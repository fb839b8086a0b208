"""The command line: what bad input does (one line, exit code 2, nothing changed), and what good input prints.

Every test runs `dispc.cli.main` with a command line; those of signals run the command as a process of its own.
"""

import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command
import numpy as np
import onnx
import pytest
import tiny
import torch
from command import assert_refused, fingerprint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dispc import cli
from dispc.checkpoint import Checkpoint
from dispc.errors import CheckpointError
from dispc.families import FAMILIES
from dispc.masks import Masks
from dispc.validate.parity import Thresholds

COMMANDS = ("compile", "validate", "doctor", "generate", "inspect", "demo", "learn", "eval", "import-masks")


@dataclass(frozen=True)
class Desk:
    """A model with masks, an older artifact of it, and a free place for a new one."""

    place: Path
    model: Path
    older: Path
    new: Path

    def refuses(self, *options: object, says: tuple[str, ...] = (), code: int = 2) -> None:
        """`dispc compile` is refused alike when the artifact is a new one and when it would replace the older one."""
        for output in (["-o", self.new], ["-o", self.older, "--force"]):
            assert_refused(self.place, "compile", self.model, *target(options), *output, *options, says=says, code=code)

    def compiles(self, *options: object) -> Path:
        outcome = command.run("compile", self.model, *target(options), "-o", self.new, "--no-validate", *options)
        assert outcome.code == 0, outcome
        return self.new


def target(options: tuple[object, ...]) -> tuple[str, ...]:
    return () if "--target" in options else ("--target", "onnx-cpu")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with masks in `model`, and its artifact in `older`."""
    place = tmp_path_factory.mktemp("originals")
    model = tiny.make_model("llama", place / "model")
    config = Checkpoint(model).config
    Masks.random(config, 0.5, 1).save(model / "masks.safetensors", config)
    outcome = command.run("compile", model, "-t", "onnx-cpu", "-o", place / "older", "--no-validate")
    assert outcome.code == 0, outcome
    return place


@pytest.fixture
def desk(tmp_path: Path, originals: Path) -> Desk:
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return Desk(tmp_path, tmp_path / "model", tmp_path / "older", tmp_path / "new")


# Damage, done to a model directory


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / "config.json", **changes)


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (model / name).write_bytes(content)

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
    """Make the weights one shard behind an index that names it, or `shard`, and the tensors in `more` too."""

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
    "opt-350m": (configured(model_type="opt", do_layer_norm_before=False), ("OPT-350M", *FAMILIES)),
    "dynamic rope": (configured(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), ("dynamic", *FAMILIES)),
    "longrope": (configured(rope_scaling={"type": "longrope"}), ("longrope", *FAMILIES)),
    "quantised": (configured(quantization_config={"quant_method": "gptq"}), ("already quantised", *FAMILIES)),
    "no weights": (removed("model.safetensors"), ("no model.safetensors",)),
    "empty weights": (truncated(0.0), ("model.safetensors", "truncated or corrupt")),
    "half a header": (truncated(0.001), ("model.safetensors", "truncated or corrupt")),
    "half the weights": (truncated(0.5), ("model.safetensors", "truncated or corrupt")),
    "header of nonsense": (
        written("model.safetensors", struct.pack("<Q", 9) + b"not json!" * 9),
        ("model.safetensors", "truncated or corrupt"),
    ),
    "index is not json": (written(SHARD, b"{"), (SHARD, "not valid JSON")),
    "index without a map": (written(SHARD, b"{}"), (SHARD, "no weight_map")),
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
}  # fmt: skip


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


# Options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--target", "tpu"), ("unknown target 'tpu'", "onnx-cuda, onnx-cpu, onnx")),
        (("--target", "onnx-cuda", "--dtype", "int4"), ("no dtype 'int4'", "float16, bfloat16, float32")),
        (("--target", "onnx-cpu", "--dtype", "float16"), ("no dtype 'float16'", "float32")),
        (("--padding", "middle"), ("unknown padding 'middle'", "left or right")),
        (("--lowering", "magic"), ("unknown lowering 'magic'", "inverse-gather, canonical")),
        (("--target", "onnx", "--padding", "right"), ("--padding left",)),
        (("--target", "onnx-cuda", "--dtype", "float32", "--padding", "right"), ("--padding left",)),
        (
            ("--target", "onnx-cuda", "--dtype", "bfloat16", "--lowering", "canonical"),
            ("bfloat16", "--lowering inverse-gather"),
        ),
        (("--dense", "--masks", "masks.safetensors"), ("--dense and --masks",)),
        (("--quantize", "int3"), ("unknown quantisation 'int3'", "int4, int8")),
        (("--quantize", "int4", "--block-size", "48"), ("block size 48", "16, 32, 64, 128, 256")),
        (("--quantize", "int8", "--block-size", "8"), ("block size 8", "16, 32, 64, 128, 256")),
        (("--block-size", "64"), ("without --quantize",)),
        (("--quantize-head",), ("without --quantize",)),
        (("--no-int8-activations",), ("without --quantize",)),
        (("--target", "onnx-cuda", "--quantize", "int4", "--int8-activations"), ("--target onnx-cpu",)),
        (("--target", "onnx", "--quantize", "int4"), ("standard operators", "--target onnx-cpu or onnx-cuda")),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_way_out(
    options: tuple[str, ...], says: tuple[str, ...], desk: Desk
) -> None:
    desk.refuses(*options, says=says)


# Output


def test_an_output_that_exists_is_replaced_by_force_only(desk: Desk) -> None:
    compile_older = ("compile", desk.model, "-t", "onnx", "-o", desk.older, "--no-validate")
    assert_refused(desk.place, *compile_older, says=(str(desk.older), "exists already", "--force"))
    assert command.run(*compile_older, "--force").code == 0
    assert json.loads((desk.older / "dispc.json").read_text())["target"] == "onnx"
    assert sorted(path.name for path in desk.place.iterdir()) == ["model", "older"]


def test_force_does_not_replace_what_is_no_artifact(desk: Desk) -> None:
    for output in (desk.model, desk.model / "config.json"):
        arguments = ("compile", desk.model, "-t", "onnx-cpu", "-o", output, "--force")
        assert_refused(desk.place, *arguments, says=(str(output), "is not an artifact"))


def test_an_output_that_cannot_be_written_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    inside_a_file = desk.model / "config.json" / "out"
    arguments = ("compile", desk.model, "-t", "onnx-cpu", "--no-validate", "-o")
    assert_refused(desk.place, *arguments, inside_a_file, says=(str(inside_a_file), "config.json is not a directory"))

    def denied(*args: Any, **options: Any) -> str:  # as root no directory is read-only
        raise PermissionError(errno.EACCES, "Permission denied", str(desk.place))

    monkeypatch.setattr("dispc.export.write.mkdtemp", denied)
    desk.refuses("--no-validate", says=("cannot be written", "Permission denied"))


def test_a_disk_that_is_too_full_is_noticed_before_writing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(desk.place)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10))
    desk.refuses("--no-validate", says=("the disk is too full", "MiB needed, 0.0 MiB free"))


@pytest.mark.parametrize("where", ["onnx_ir.save", "shutil.copyfile", "dispc.compiler.write_json"])
def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    where: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(where, full)
    desk.refuses("--no-validate", says=("cannot be written", "No space left on device"))


def test_an_artifact_that_fails_validation_is_shown_and_not_kept(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispc.validate.parity.DEFAULTS", Thresholds(error=1e-9))
    before = fingerprint(desk.place)
    arguments = ("compile", desk.model, "-t", "onnx-cpu", "-o", desk.older, "--force")
    table = command.run(*arguments)
    assert (table.code, len(table.err.splitlines())) == (1, 1)
    assert "FAIL" in table.out and "--no-validate" in table.err
    report = command.run(*arguments, "--json")
    assert report.code == 1
    assert json.loads(report.out)["validation"]["passed"] is False
    assert fingerprint(desk.place) == before


# Errors as a user sees them


def test_debug_lets_the_traceback_through_wherever_it_stands(desk: Desk) -> None:
    removed("config.json")(desk.model)
    for arguments in (("--debug", "compile", desk.model), ("compile", desk.model, "--debug")):
        with pytest.raises(CheckpointError):
            command.run(*arguments, "-t", "onnx-cpu")


def test_an_error_of_several_lines_is_printed_as_one(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise CheckpointError("first\n  second")

    monkeypatch.setattr("dispc.compiler.load_masks", fail)
    desk.refuses(says=("error: first second",))


def test_an_error_is_printed_as_it_is_whatever_the_path_holds(desk: Desk) -> None:
    for name in ("[bold]x[/bold]", ":smile:", "[/]", "a" * 300):
        assert_refused(desk.place, "inspect", desk.place / name, says=(str(desk.place / name),))


def test_ctrl_c_is_one_line_and_code_130_and_leaves_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    for where in ("load_masks", "trace", "check_file", "write_companions"):
        with monkeypatch.context() as patch:
            patch.setattr(f"dispc.compiler.{where}", interrupted)
            desk.refuses("--no-validate", says=("interrupted",), code=130)


SLOW = """
import sys, time
from pathlib import Path
import dispc.weights
from dispc.cli import main
evaluate = dispc.weights.LazyWeight.evaluate
def slowly(self, *out):
    Path({marker!r}).touch()
    time.sleep(0.5)
    return evaluate(self, *out)
dispc.weights.LazyWeight.evaluate = slowly
main()
"""


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code", "lines"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 0)])
def test_a_signal_in_the_middle_of_writing_leaves_the_older_artifact_and_nothing_else(
    number: signal.Signals, code: int, lines: int, desk: Desk, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = fingerprint(desk.place)
    marker = tmp_path_factory.mktemp("marker") / "writing"
    arguments = ["compile", desk.model, "-t", "onnx-cpu", "-o", desk.older, "--force", "--no-validate"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(marker=str(marker)), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(marker, process)
        assert any(path.name.endswith(".partial") for path in desk.place.iterdir())
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out) == (code, "")
    assert len(err.splitlines()) == lines, err
    assert all(line.startswith("error: interrupted") for line in err.splitlines())
    assert fingerprint(desk.place) == before


def test_the_installed_command_prints_one_line_and_with_debug_a_traceback(desk: Desk) -> None:
    removed("config.json")(desk.model)
    arguments = [Path(sys.executable).with_name("dispc"), "inspect", desk.model / "lost"]
    plain, debug = (
        subprocess.run([*arguments, *more], capture_output=True, text=True, check=False) for more in ([], ["--debug"])
    )
    assert (plain.returncode, plain.stdout) == (2, "")
    assert re.fullmatch(r"error: .*lost: is no mask file, artifact or model directory\n", plain.stderr)
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr


# Formats and paths


@pytest.mark.parametrize("shards", [False, True])
def test_torch_files_compile_to_the_same_bytes_as_safetensors(shards: bool, desk: Desk) -> None:
    state = load_file(desk.model / "model.safetensors")
    (desk.model / "model.safetensors").unlink()
    if shards:
        names = sorted(state)
        held = {"a.bin": names[::2], "b.bin": names[1::2]}
        for shard, part in held.items():
            torch.save({name: state[name] for name in part}, desk.model / shard)
        weight_map = {name: shard for shard, part in held.items() for name in part}
        (desk.model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, desk.model / "pytorch_model.bin")
    new, older = fingerprint(desk.compiles()), fingerprint(desk.older)
    new.pop("dispc.json"), older.pop("dispc.json")  # it holds the times
    assert new == older


def test_the_output_is_named_after_model_and_target_wherever_the_command_runs(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk.model)
    for spelled in (".", "../model", str(desk.model)):
        outcome = command.run("compile", spelled, "-t", "onnx-cpu", "--no-validate", "--json")
        assert outcome.code == 0, outcome
        assert (desk.place / "model-onnx-cpu" / "dispc.json").is_file()
        shutil.rmtree(desk.place / "model-onnx-cpu")


# validate


def test_validate_of_a_good_artifact_passes_in_every_form(desk: Desk) -> None:
    arguments = ("validate", desk.older, "--reference", desk.model, "--json-file", desk.place / "report.json")
    table, report = command.run(*arguments), command.run(*arguments, "--json")
    assert (table.code, report.code) == (0, 0)
    parsed = json.loads(report.out)
    assert parsed["passed"] is True
    assert json.loads((desk.place / "report.json").read_text()) == parsed
    shown = " ".join(table.out.replace("│", " ").split())
    for check in parsed["checks"]:
        assert check["name"].split()[0] in shown
    assert "passed" in table.out and "FAIL" not in table.out
    assert table.err == report.err == ""


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
    "model file of nonsense": (replace_artifact_file("model.onnx", b"nope"), ("model.onnx", "cannot load")),
    "half a model file": (halve("model.onnx"), ("model.onnx", "cannot load")),
    "half the weights": (halve("model.onnx.data"), ("model.onnx", "cannot load")),
    "no weights": (lambda desk: (desk.older / "model.onnx.data").unlink(), ("model.onnx", "cannot load")),
    "no masks": (lambda desk: (desk.older / "masks.safetensors").unlink(), ("masks.safetensors", "no such mask file")),
    "other masks": (other_masks, ("masks.safetensors", "is not the file")),
    "manifest is not json": (replace_artifact_file("dispc.json", b"{"), ("dispc.json", "cannot be read")),
    "manifest of nonsense": (replace_artifact_file("dispc.json", b"[1]"), ("dispc.json", "is not the dispc.json")),
    "manifest without padding": (spoil_json(padding=None), ("dispc.json", "padding")),
    "manifest without masks": (spoil_json(masks_sha256=None), ("dispc.json", "masks_sha256")),
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


# Help and output


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_holds_an_example_of_it(name: str) -> None:
    outcome = command.run(name, "--help")
    assert outcome.code == 0
    assert f"dispc {name}" in outcome.out.split("Example:")[1]


def test_every_command_has_been_listed_here_and_in_the_help() -> None:
    outcome = command.run("--help")
    registered = {info.name or info.callback.__name__ for info in cli.app.registered_commands if info.callback}
    assert registered == set(COMMANDS)
    assert all(name in outcome.out for name in registered)


@pytest.mark.parametrize("arguments", [(), ("frobnicate",), ("compile",), ("compile", "model", "--frobnicate")])
def test_a_line_that_cannot_be_parsed_has_code_2_and_no_traceback(arguments: tuple[str, ...]) -> None:
    outcome = command.run(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


def test_version_is_that_of_the_package() -> None:
    from dispc import __version__

    assert command.run("--version").out.strip() == __version__


def test_compile_prints_tables_or_json_of_the_same_facts(desk: Desk) -> None:
    arguments = ("compile", desk.model, "-t", "onnx-cpu", "-o", desk.new, "--force")
    table, report = command.run(*arguments), command.run(*arguments, "--json")
    assert (table.code, report.code) == (0, 0), table
    assert table.err == report.err == ""
    manifest = json.loads(report.out)
    assert manifest.pop("output") == str(desk.new)
    assert manifest == json.loads((desk.new / "dispc.json").read_text())
    blocks = manifest["block_parameters"]
    assert f"{blocks['kept']:,} of {blocks['dense']:,}" in table.out
    assert all(record["name"] in table.out for record in manifest["passes"])
    assert "Validation passed" in table.out


def test_the_demo_names_the_ratios_for_which_masks_ship(tmp_path: Path) -> None:
    assert_refused(tmp_path, "demo", "--pruning-ratio", 0.35, says=("0.35", "there are some for", "0.3"))
