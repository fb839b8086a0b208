"""What no prompt meets: the files beside the graph, dispc.json, the validation in it, and the masks that are meant."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import harness
import onnx
import pytest
from artifacts import artifact, failed, loaded
from sets import half

from dispc.compiler import CompileOptions, compile_model
from dispc.masks import Masks
from dispc.support.errors import CheckpointError
from dispc.support.graph import locations
from dispc.validate import CheckOptions, check
from dispc.validate.checks import facts
from dispc.validate.checks.facts import NAME as FACTS
from dispc.validate.checks.files import COMPANIONS, first_difference, judge_companions
from dispc.validate.checks.graph import NAME as GRAPH
from dispc.validate.checks.rewriting import other_releases
from dispc.validate.checks.weights import NAME as WEIGHTS
from dispc.validate.comparison import Comparison


def edit_json(name: str, *keys: str, value: Any) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        content = json.loads((out / name).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (out / name).write_text(json.dumps(content))

    return edit


def mark(out: Path) -> None:
    file = out / "genai_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def hide(out: Path) -> None:
    """optimum takes the first *.onnx of a repository, and a dot sorts before letters."""
    (out / ".cache").mkdir()
    (out / ".cache" / "model.onnx").write_bytes(b"")


def move_weights(out: Path) -> None:
    """Where copies of model.onnx* are without them."""
    model = onnx.load(out / "model.onnx", load_external_data=False)
    for entry in locations(model):
        entry.value = ".w"
    onnx.save(model, out / "model.onnx")
    (out / "model.onnx.data").rename(out / ".w")


def append(out: Path) -> None:
    with (out / "model.onnx.data").open("ab") as file:
        file.write(b"x" * 99)
    manifest = json.loads((out / "dispc.json").read_text())
    (out / "dispc.json").write_text(json.dumps(manifest | {"bytes": manifest["bytes"] + 99}))


def onnx_edit(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        model = onnx.load(out / "model.onnx", load_external_data=False)
        change(model)
        onnx.save(model, out / "model.onnx")

    return edit


add_metadata = onnx_edit(lambda model: model.metadata_props.add(key="ort_config", value="{}"))


DECODER, SEARCH = ("genai_config.json", "model", "decoder"), ("genai_config.json", "search")


@pytest.mark.parametrize(
    ("damage", "check_name", "says"),
    [
        (lambda out: (out / "generation_config.json").unlink(), COMPANIONS, "generation_config.json is missing"),
        (lambda out: (out / "config.json").write_text("{}"), COMPANIONS, "config.json differs from the reference"),
        (lambda out: (out / "genai_config.json").unlink(), COMPANIONS, "genai_config.json cannot be read"),
        (lambda out: (out / "genai_config.json").write_text('{"model": 3}'), COMPANIONS, "model is 3"),
        (edit_json("genai_config.json", "model", "eos_token_id", value=[77]), COMPANIONS, r"eos_token_id is \[77\]"),
        (edit_json("genai_config.json", "model", "context_length", value=9999), COMPANIONS, "context_length is 9999"),
        (edit_json(*DECODER, "filename", value="other.onnx"), COMPANIONS, 'filename is "other.onnx"'),
        (edit_json(*DECODER, "num_hidden_layers", value=2), COMPANIONS, "num_hidden_layers is 2, expected 3"),
        (edit_json(*DECODER, "num_key_value_heads", value=4), COMPANIONS, "num_key_value_heads is 4, expected 2"),
        (edit_json(*DECODER, "inputs", "input_ids", value="ids"), COMPANIONS, 'inputs.input_ids is "ids"'),
        (edit_json(*DECODER, "outputs", "logits", value="l"), COMPANIONS, 'outputs.logits is "l"'),
        (edit_json(*DECODER, "session_options", "custom_ops_library", value="x.so"), COMPANIONS, "custom_ops_library"),
        (edit_json(*SEARCH, "past_present_share_buffer", value=False), COMPANIONS, "share_buffer is false"),
        (edit_json(*SEARCH, "do_sample", value=True), COMPANIONS, "do_sample is true, expected false"),
        (edit_json(*SEARCH, "temperature", value=0.1), COMPANIONS, "temperature is 0.1"),
        (lambda out: (out / "chat_template.jinja").write_text("{{ x }}"), COMPANIONS, "the reference has none"),
        (lambda out: (out / "modeling.py").write_text("x"), COMPANIONS, "modeling.py: no file of an artifact"),
        (lambda out: (out / "model.ort").write_text("x"), COMPANIONS, "model.ort: no file of an artifact"),
        (lambda out: (out / "tekken.json").write_text("{}"), COMPANIONS, "tekken.json: no file of an artifact"),
        (lambda out: (out / "onnx").mkdir(), COMPANIONS, "onnx: no file of an artifact"),
        (
            lambda out: (out / "chat_template.jinja").symlink_to("/gone"),
            COMPANIONS,
            "chat_template.jinja: the reference",
        ),
        (hide, COMPANIONS, r"\.cache/model.onnx: no file of an artifact"),
        (mark, COMPANIONS, "genai_config.json begins with a byte order mark"),
        (move_weights, COMPANIONS, r"model.onnx has weights in \.w, not in model.onnx.data"),
        (append, COMPANIONS, r"model.onnx.data has 99 bytes at its end that are no weights"),
        (onnx_edit(lambda model: model.training_info.add()), GRAPH, "it has training of its own"),
        (onnx_edit(lambda model: setattr(model, "doc_string", "x")), GRAPH, "it has a text of its own"),
        (onnx_edit(lambda model: model.opset_import.add(domain="", version=21)), GRAPH, "2 opsets of ai.onnx"),
        (
            onnx_edit(lambda model: model.graph.node[3].metadata_props.add(key="a", value="b")),
            GRAPH,
            "has other metadata",
        ),
        (add_metadata, FACTS, "model.onnx has metadata of its own: ort_config"),
        (edit_json("dispc.json", "needs", "onnxruntime", value="0.1"), GRAPH, "needs.onnxruntime is 0.1, it needs"),
        (lambda out: (out / "LICENSE").write_text("free"), COMPANIONS, "LICENSE: not the reference's"),
        (lambda out: (out / "LICENSE").symlink_to("gone"), COMPANIONS, "LICENSE: not the reference's"),
        (edit_json("dispc.json", "stop_tokens", value=[77]), FACTS, r"stop_tokens is \[77\], it should be \[2\]"),
        (edit_json("dispc.json", "widths", value=[]), FACTS, r"widths is \[\], it should be "),
        (edit_json("dispc.json", "bytes", value=1), FACTS, "bytes is 1, it should be"),
        (edit_json("dispc.json", "block_parameters", "kept", value=9), FACTS, "block_parameters.kept is 9"),
        (edit_json("dispc.json", "norm_scope", value="selected"), FACTS, 'norm_scope is "selected"'),
        (edit_json("dispc.json", "nodes", value=5), FACTS, "nodes is 5"),
        (edit_json("dispc.json", "pipeline", value="unroll"), FACTS, "pipeline is unroll, model.onnx says"),
        (edit_json("dispc.json", "dispc", value="9.9"), FACTS, "dispc is 9.9, model.onnx says"),
        (edit_json("dispc.json", "needs", "opset", value=7), FACTS, "needs.opset is 7"),
        (edit_json("dispc.json", "lowering", "name", value="canonical"), FACTS, "lowering is canonical"),
        (edit_json("dispc.json", "lowering", "name", value="nonsense"), FACTS, "nonsense"),
        (edit_json("dispc.json", "lowering", "filled", value=["0.mlp.read"]), FACTS, r"lowering.filled is \["),
        (edit_json("dispc.json", "cuda_graph", value=True), FACTS, "cuda_graph is true"),
        (edit_json("dispc.json", "fusions", value=["fuse-nothing"]), FACTS, r"fusions is \["),
        (edit_json("dispc.json", "validation", value={"passed": True}), FACTS, "validation is no report"),
    ],
)
def test_files_beside_the_model_are_those_of_the_reference_and_tell_the_truth(
    damage: Callable[[Path], None], check_name: str, says: str, tmp_path: Path
) -> None:
    out = shutil.copytree(artifact("llama"), tmp_path / "out")
    damage(out)
    report = check(out, harness.checkpoint("llama").directory)
    assert check_name in failed(report) <= {COMPANIONS, FACTS, GRAPH, WEIGHTS}
    assert re.search(says, next(each.detail for each in report.checks if each.name == check_name))


def test_hidden_links_are_not_followed(tmp_path: Path) -> None:
    out = shutil.copytree(artifact("llama"), tmp_path / "out")
    (out / ".all").symlink_to("/")
    assert check(out, harness.checkpoint("llama").directory).passed


def test_a_licence_of_the_reference_that_is_gone_is_missed(tmp_path: Path) -> None:
    model = shutil.copytree(harness.checkpoint("llama").directory, tmp_path / "model")
    (model / "LICENSE").write_text("free")
    judged = judge_companions(Comparison(artifact("llama"), model, CheckOptions(device="cpu")))
    assert ["LICENSE is missing" in each.detail for each in judged] == [True]


def test_masks_beside_the_reference_that_lead_nowhere_are_not_passed_over(tmp_path: Path) -> None:
    model = shutil.copytree(harness.checkpoint("llama").directory, tmp_path / "model")
    (model / "masks.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match="masks.safetensors: is a link that leads nowhere"):
        check(artifact("llama"), model, CheckOptions(device="cpu"))


def test_versions_cannot_shadow_the_release_of_dispc(tmp_path: Path) -> None:
    out = shutil.copytree(artifact("llama"), tmp_path / "out")
    edit_json("dispc.json", "versions", "dispc", value="0.0")(out)
    assert other_releases(loaded(out, "llama")) == ""


@pytest.mark.parametrize(
    ("variant", "alive"), [("llama", ()), ("phi", ()), ("smollm3", ()), ("smollm3", (1,))], ids=str
)
def test_without_attentions_or_without_those_that_rotate_a_right_artifact_passes(
    variant: str, alive: tuple[int, ...], tmp_path: Path
) -> None:
    """Of SmolLM3's blocks the second rotates nothing."""
    config = harness.checkpoint(variant).config
    dead: dict[str, Any] = {"attention.read": []}
    blocks = [{} if index in alive else dead for index in range(config.num_hidden_layers)]
    Masks.from_indices(blocks, config, norm_scope="full").save(tmp_path / "masks", config)
    options = CompileOptions(
        model=harness.checkpoint(variant).directory,
        masks=tmp_path / "masks",
        output=tmp_path / "out",
        target="onnx-cpu",
    )
    assert compile_model(options).passed
    report = check(tmp_path / "out", options.model, CheckOptions(masks=tmp_path / "masks", device="cpu"))
    assert report.passed, failed(report)


def test_reports_and_hidden_files_may_lie_beside_the_model(tmp_path: Path) -> None:
    out = shutil.copytree(artifact("llama"), tmp_path / "out")
    for name in ("report.json", "report.xml", "summary.md", "report.html", ".gitattributes"):
        (out / name).write_text("x")
    assert [each.status for each in judge_companions(loaded(out, "llama"))] == ["passed"]


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that keeps the report of the validation when it was made."""
    folder = tmp_path_factory.mktemp("validated")
    checkpoint = harness.checkpoint("llama")
    half("llama").save(folder / "masks.safetensors", checkpoint.config)
    options = CompileOptions(
        model=checkpoint.directory, masks=folder / "masks.safetensors", output=folder / "out", target="onnx-cpu"
    )
    compile_model(options)
    return folder / "out"


def forge(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda validation: validation.update(changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (forge(), ""),
        (forge(passed=False), "did not pass when it was made"),
        (forge(dtype="float16"), 'validation.dtype is "float16"'),
        (forge(bytes=3), "validation.bytes is 3"),
        (lambda validation: validation["checks"][0].update(figure=9.0), "embeddings has passed with 9.0 against"),
        (lambda validation: validation["checks"][0].update(figure=None), "embeddings has passed with None against"),
        (lambda validation: validation["checks"][1].update(status="failed"), "did not pass when it was made"),
        (lambda validation: validation["checks"].pop(0), "lacks the check embeddings"),
        (lambda validation: validation["widths"][1].update({"mlp.mid": 1}), "validation.widths"),
    ],
)
def test_a_forged_validation_is_found(
    change: Callable[[dict[str, Any]], None], says: str, validated: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(validated, tmp_path / "out")
    manifest = json.loads((out / "dispc.json").read_text())
    change(manifest["validation"])
    (out / "dispc.json").write_text(json.dumps(manifest))
    report = check(out, harness.checkpoint("llama").directory)
    assert failed(report) == ({FACTS} if says else set())
    assert says in next(each.detail for each in report.checks if each.name == FACTS)


def test_a_lowering_may_write_by_the_operator_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    written = artifact("llama", lowering="scatter-elements")
    monkeypatch.setitem(facts.SCATTERS, "another", "ScatterElements")
    assert [each.status for each in facts.judge_facts(loaded(written, "llama"), ())] == ["passed"]


# Masks that are meant


def stale_desk(place: Path) -> tuple[Path, Path]:
    """A model with masks beside it, and an artifact of other masks."""
    model = shutil.copytree(harness.checkpoint("llama").directory, place / "model")
    config = harness.checkpoint("llama").config
    half("llama", 1).save(model / "masks.safetensors", config)
    compile_model(CompileOptions(model=model, output=place / "out", target="onnx-cpu", validate=False))
    half("llama", 2).save(model / "masks.safetensors", config)
    return model, place / "out"


def test_masks_that_were_learned_again_and_not_compiled_fail(tmp_path: Path) -> None:
    model, out = stale_desk(tmp_path)
    outcome = command.run("validate", out, "-r", model, "--json")
    assert outcome.code == 1
    stale = next(row for row in json.loads(outcome.out)["checks"] if row["name"] == "masks")
    assert stale["status"] == "failed" and "block 0 attention.read" in stale["detail"]
    assert f"--masks {out / 'masks.safetensors'}" in stale["detail"]
    assert command.run("validate", out, "-r", model, "--masks", out / "masks.safetensors").code == 0
    shutil.copy(out / "masks.safetensors", model / "masks.safetensors")
    report = check(out, model)
    assert report.passed
    assert next(each.status for each in report.checks if each.name == "masks") == "passed"


def test_masks_named_on_the_command_line_are_those_that_are_meant(tmp_path: Path) -> None:
    model, out = stale_desk(tmp_path)
    other = tmp_path / "other.safetensors"
    half("llama", 3).save(other, harness.checkpoint("llama").config)
    assert "masks" in failed(check(out, model, CheckOptions(masks=other)))
    other.write_bytes(b"nonsense")
    assert command.run("validate", out, "-r", model, "--masks", other).code == 2


def test_compiling_judges_by_the_masks_that_it_compiled(tmp_path: Path) -> None:
    model, out = stale_desk(tmp_path)
    options = CompileOptions(model=model, masks=out / "masks.safetensors", output=tmp_path / "new", target="onnx-cpu")
    assert compile_model(options).passed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"norm_scope": "selected"}, "norm scope full, meant is selected"),
        ({"seed": 2}, "block 0 attention.read "),
    ],
)
def test_the_first_difference_of_masks_is_named(change: dict[str, Any], says: str | None) -> None:
    difference = first_difference(half("llama"), half("llama", **change))
    assert difference is None if says is None else says in str(difference)
