"""The compiler end to end: every family, norm scope and target against the masked torch reference."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import onnx
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from sets import widths

from dispc.compiler import CompileOptions, ParityFailure, compile_model
from dispc.manifest import Manifest
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.support.errors import ArtifactError
from dispc.validate.checks.parity import LIMITS, Thresholds, logit_error
from dispc.validate.checks.table import CHECKS

FULL_MATRIX = [
    (v, s, t) for v in tiny.VARIANTS for s in ("full", "selected") for t in ("onnx-cpu", "onnx-cuda", "onnx")
]


def compile_variant(variant: str, masks: Masks, tmp_path: Path, target: str, **options: Any) -> Manifest:
    checkpoint = harness.checkpoint(variant)
    masks.save(tmp_path / "masks.safetensors", checkpoint.config)
    return compile_model(
        CompileOptions(
            model=checkpoint.directory,
            masks=tmp_path / "masks.safetensors",
            output=tmp_path / "out",
            target=target,
            **options,
        )
    )


@pytest.mark.parametrize(("variant", "norm_scope", "target"), FULL_MATRIX)
def test_an_artifact_computes_what_the_masked_reference_computes(
    variant: str, norm_scope: Any, target: str, tmp_path: Path
) -> None:
    config = harness.checkpoint(variant).config
    manifest = compile_variant(variant, Masks.random(config, 0.5, 3, norm_scope=norm_scope), tmp_path, target)
    validation = manifest.validation
    assert validation is not None
    assert validation["passed"]
    checks = {check["name"]: check for check in validation["checks"]}
    names = {row.name for row in CHECKS if row.quick} - {"as shipped"}
    assert set(checks) == names | {"greedy logits"}
    assert "64 steps" in checks["greedy tokens"]["detail"]


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2-mixed-window", "phi", "opt"])
@pytest.mark.parametrize(
    ("target", "dtype", "padding"),
    [
        ("onnx-cpu", "float32", "left"),
        ("onnx-cuda", "float16", "left"),
        ("onnx-cuda", "bfloat16", "right"),
        ("onnx-cuda", "bfloat16", "left"),
        ("onnx-cuda", "float32", "left"),
        ("onnx", "float16", "left"),
        ("onnx", "bfloat16", "left"),
    ],
)
def test_every_padding_and_dtype_passes_and_is_declared(
    variant: str, target: str, dtype: str, padding: str, tmp_path: Path
) -> None:
    masks = Masks.random(harness.checkpoint(variant).config, 0.4, 5)
    manifest = compile_variant(variant, masks, tmp_path, target, dtype=dtype, padding=padding)
    assert manifest.passed
    assert (manifest.padding, manifest.dtype) == (padding, dtype)
    metadata = {
        p.key: p.value for p in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).metadata_props
    }
    assert metadata["dispc.padding"] == padding


@pytest.mark.parametrize("variant", ["llama-tied-biased", "phi", "opt"])
@pytest.mark.parametrize(("target", "dtype"), [("onnx-cpu", "float32"), ("onnx-cuda", "float16"), ("onnx", "float32")])
def test_the_canonical_form_is_an_artifact_too(variant: str, target: str, dtype: str, tmp_path: Path) -> None:
    masks = Masks.random(harness.checkpoint(variant).config, 0.4, 6)
    manifest = compile_variant(variant, masks, tmp_path, target, dtype=dtype, lowering="canonical", verify_each=True)
    assert manifest.passed
    operators = [n.op_type for n in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node]
    assert operators.count("ScatterND") == 6


@pytest.mark.parametrize("variant", ["llama-tied-biased", "phi", "opt", "qwen3"])
@given(data=st.data())
@settings(max_examples=12)
def test_any_widths_keep_the_function(variant: str, data: st.DataObject) -> None:
    masks = data.draw(widths(variant))
    options = data.draw(
        st.sampled_from(
            [
                {"target": "onnx-cpu"},
                {"target": "onnx-cpu", "padding": "left"},
                {"target": "onnx"},
                {"target": "onnx-cpu", "lowering": "canonical"},
                {"target": "onnx", "lowering": "canonical"},
            ]
        )
    )
    model = harness.rewritten(variant, masks, **options)
    error = logit_error(harness.model_logits(model), harness.reference_logits(variant, masks))
    assert error <= LIMITS["float32"]


def test_a_model_whose_attentions_are_all_removed_still_runs() -> None:
    config = harness.checkpoint("llama").config
    masks = Masks.from_indices([{"attention.read": []}] * config.num_hidden_layers, config)
    model = harness.rewritten("llama", masks)
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert logit_error(harness.model_logits(model), harness.reference_logits("llama", masks)) <= LIMITS["float32"]


def test_dense_compile_gives_the_dense_model(tmp_path: Path) -> None:
    options = CompileOptions(
        model=harness.checkpoint("llama").directory, output=tmp_path / "out", target="onnx-cpu", dense=True
    )
    manifest = compile_model(options)
    assert manifest.passed
    assert manifest.block_parameters.kept == manifest.block_parameters.dense
    assert "Gather" not in harness.operators(
        harness.rewritten("llama", Masks.dense(harness.checkpoint("llama").config)), "layers."
    )


def test_a_removed_attention_takes_its_cache_with_it(tmp_path: Path) -> None:
    config = harness.checkpoint("opt").config
    masks = Masks.from_indices([{}, {"attention.write": []}, {}], config)
    manifest = compile_variant("opt", masks, tmp_path, "onnx-cpu")
    assert manifest.passed
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    assert [v.name for v in graph.input if v.name.endswith("key")] == [
        "past_key_values.0.key",
        "past_key_values.1.key",
    ]
    assert [v.name for v in graph.output if v.name.endswith("key")] == ["present.0.key", "present.1.key"]
    genai = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["num_hidden_layers"] == manifest.cache_layers == 2


def test_the_onnx_target_uses_standard_operators_only(tmp_path: Path) -> None:
    masks = Masks.random(harness.checkpoint("llama").config, 0.5, 1)
    compile_variant("llama", masks, tmp_path, "onnx", validate=False)
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    assert {node.domain for node in model.graph.node} == {""}
    assert {"Attention", "RMSNormalization", "RotaryEmbedding"} <= {node.op_type for node in model.graph.node}


def test_full_shape_inference_finds_the_declared_logits(tmp_path: Path) -> None:
    masks = Masks.random(harness.checkpoint("qwen3").config, 0.5, 1)
    compile_variant("qwen3", masks, tmp_path, "onnx", validate=False)
    path = tmp_path / "out" / "model.onnx"
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    known = {value.name: value for value in [*inferred.graph.value_info, *inferred.graph.output]}
    for node in inferred.graph.node:
        if node.op_type in ("MatMul", "Gather", "Add", "RMSNormalization"):
            assert known[node.output[0]].type.tensor_type.HasField("shape"), node.name


def test_node_names_say_the_projection_and_its_widths(tmp_path: Path) -> None:
    masks = Masks.random(harness.checkpoint("llama").config, 0.5, 1)
    compile_variant("llama", masks, tmp_path, "onnx-cpu", validate=False, lowering="canonical")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    nodes = {node.name: node for node in graph.node}
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    down = nodes["/model/layers.2/mlp/down_proj/MatMul"]
    sets = masks.blocks[2].sets()
    assert sizes[down.input[1]][0] == len(sets["mlp.mid"])
    assert sizes[down.input[1]][1] >= len(sets["mlp.write"])
    assert sizes[nodes["/model/layers.2/mlp/read/Gather"].input[1]] == [len(sets["mlp.read"])]
    properties = {entry.key: entry.value for entry in down.metadata_props}
    assert properties["dispc.writes"] == f"{len(sets['mlp.write'])} of {masks.hidden_size}"


def test_half_precision_and_sharded_checkpoints_compile(tmp_path: Path) -> None:
    import torch

    tiny.make_model("llama", tmp_path / "model", dtype=torch.bfloat16, max_shard_size="100KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    options = CompileOptions(model=tmp_path / "model", output=tmp_path / "out", target="onnx-cpu", dense=True)
    assert compile_model(options).passed


def test_dumped_graphs_are_one_per_pass_and_load(tmp_path: Path) -> None:
    masks = Masks.random(harness.checkpoint("llama").config, 0.5, 1)
    manifest = compile_variant("llama", masks, tmp_path, "onnx-cpu", validate=False, dump_ir=tmp_path / "ir")
    names = [f"{number:02d}-{record.name}" for number, record in enumerate(manifest.passes, start=1)]
    assert sorted(path.stem for path in (tmp_path / "ir").glob("*.onnx")) == ["00-trace", *names]
    canonical = onnx.load(tmp_path / "ir" / "02-prune-blocks.onnx")
    assert [node.op_type for node in canonical.graph.node].count("ScatterND") == 6


@pytest.mark.parametrize(
    ("make", "force", "says"),
    [
        (lambda place: (place / "00-trace.onnx").write_text("mine"), False, "00-trace.onnx: exists already"),
        (lambda place: os.mkfifo(place / "00-trace.onnx"), True, "00-trace.onnx: is no regular file"),
        (lambda place: os.mkfifo(place / "not-rewritten.txt"), True, "not-rewritten.txt: is no regular file"),
        (lambda place: (place.rmdir(), place.write_text("mine")), True, "is not a directory"),
    ],
    ids=["older", "pipe", "pipe of reasons", "file"],
)
def test_a_dump_replaces_files_by_force_only_and_waits_for_no_pipe(
    make: Callable[[Path], Any], force: bool, says: str, tmp_path: Path
) -> None:
    (tmp_path / "ir").mkdir()
    make(tmp_path / "ir")
    masks, before = Masks.random(harness.checkpoint("llama").config, 0.5, 1), sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match=says):
        compile_variant("llama", masks, tmp_path, "onnx-cpu", validate=False, dump_ir=tmp_path / "ir", force=force)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "masks.safetensors"])


def test_the_manifest_describes_the_artifact(tmp_path: Path) -> None:
    checkpoint: Checkpoint = harness.checkpoint("llama")
    masks = Masks.random(checkpoint.config, 0.5, 1)
    manifest = compile_variant("llama", masks, tmp_path, "onnx-cpu")
    assert json.loads((tmp_path / "out" / "dispc.json").read_text()) == manifest.to_json()
    assert manifest.block_parameters.kept == masks.kept_parameters(checkpoint.config)
    assert manifest.masks_sha256 == masks.sha256() == Masks.load(tmp_path / "out" / "masks.safetensors").sha256()
    assert manifest.bytes == sum(f.stat().st_size for f in (tmp_path / "out").glob("model.onnx*"))


def test_an_artifact_that_fails_validation_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispc.validate.checks.parity.DEFAULTS", Thresholds(error=1e-9))
    masks = Masks.random(harness.checkpoint("llama").config, 0.5, 1)
    with pytest.raises(ParityFailure):
        compile_variant("llama", masks, tmp_path, "onnx-cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks.safetensors"]
