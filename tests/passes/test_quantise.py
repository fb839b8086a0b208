"""Quantisation: the graph computes what torch computes with the same weights rounded, whatever widths are left."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import command
import harness
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised import EVERYTHING, quantised_model
from sets import widths

from dispc.compiler import CompileOptions, compile_model
from dispc.manifest import Manifest, read_manifest
from dispc.masks import Masks
from dispc.passes import quantise, rounding
from dispc.passes.pipeline import build_pipeline, run_pipeline
from dispc.passes.quantise import QuantisedWeight, QuantisePass
from dispc.plan import Choices, make_plan
from dispc.quantisation import BLOCK_SIZES, Quantisation, make_quantisation
from dispc.reference.quantised import round_blocks
from dispc.support.errors import CompileError
from dispc.validate import CheckOptions, check
from dispc.validate.checks import variants
from dispc.validate.checks.parity import DEFAULTS, LIMITS, logit_error
from dispc.validate.checks.verify import make_verifier

INT4 = Quantisation(bits=4, block_size=32, symmetric=True, head=False, embedding=False)
INT8 = Quantisation(bits=8, block_size=32, symmetric=True, head=False, embedding=False)
CPU_INT8 = replace(INT8, int8_activations=True)
QUANTISATIONS = st.builds(
    Quantisation,
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from(BLOCK_SIZES),
    symmetric=st.booleans(),
    head=st.booleans(),
    embedding=st.booleans(),
)
PARTS = ("quantised", "scales", "zero_points")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def read_back(parts: dict[str, harness.Array], quantisation: Quantisation, inputs: int) -> harness.Array:
    """[N,K] float32 from the tensors of a weight, by the definition of MatMulNBits."""
    outputs = len(parts["scales"])

    def unpack(packed: harness.Array) -> harness.Array:
        flat = packed.reshape(outputs, -1).astype(np.float32)
        return flat if quantisation.bits == 8 else np.stack([flat % 16, flat // 16], axis=-1).reshape(outputs, -1)

    scales = parts["scales"].astype(np.float32)
    zero_points: Any = 2 ** (quantisation.bits - 1)
    if not quantisation.symmetric:
        zero_points = unpack(parts["zero_points"])[:, : scales.shape[1], None].repeat(quantisation.block_size, axis=2)
        zero_points = zero_points.reshape(outputs, -1)[:, :inputs]
    spread = scales[:, :, None].repeat(quantisation.block_size, axis=2).reshape(outputs, -1)[:, :inputs]
    read: harness.Array = (unpack(parts["quantised"])[:, :inputs] - zero_points) * spread
    return read


@given(
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 9)),
    quantisation=QUANTISATIONS,
    dtype=st.sampled_from(list(DTYPES)),
    rows=st.booleans(),
    coarse=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_torch_rounds_every_weight_exactly_as_the_quantiser_does(
    sizes: tuple[int, int], quantisation: Quantisation, dtype: str, rows: bool, coarse: bool, seed: int
) -> None:
    inputs, outputs = sizes
    if rows:
        inputs += inputs % 2  # int4 embeddings
    values = np.random.default_rng(seed).standard_normal((outputs, inputs))
    if coarse:  # ties between two integers, blocks of zeros, extremes of both signs
        values = np.round(values * 2) / 2
    weight = values.astype(DTYPES[dtype])
    stored = weight if rows else np.ascontiguousarray(weight.T)
    tensors = QuantisedWeight(ir.tensor(stored, name="w"), quantisation, rows=rows).tensors()
    parts = {part: tensor.numpy() for part, tensor in tensors.items()}
    for part, tensor in tensors.items():
        assert parts[part].shape == tuple(tensor.shape.numpy())
        assert parts[part].dtype == tensor.dtype.numpy()
    expected = round_blocks(torch.from_numpy(values).to(getattr(torch, dtype)), quantisation).numpy()
    np.testing.assert_array_equal(read_back(parts, quantisation, inputs), expected)


@pytest.mark.parametrize("variant", ["llama-tied-biased", "phi", "opt"])
@given(data=st.data())
@settings(max_examples=12)
def test_the_graph_computes_the_rounded_reference_whatever_the_widths(variant: str, data: st.DataObject) -> None:
    masks, quantisation = data.draw(widths(variant)), data.draw(QUANTISATIONS)
    options = data.draw(st.sampled_from([{}, {"padding": "left"}, {"lowering": "inverse-gather"}]))
    options |= {"align": data.draw(st.sampled_from([1, 8, 32]))}
    found = harness.model_logits(quantised_model(variant, masks, quantisation, **options))
    assert harness.times_own(variant, masks, [harness.TOKENS], [found], quantisation) <= DEFAULTS.error


@pytest.mark.parametrize("quantisation", [INT4, INT8, EVERYTHING, replace(EVERYTHING, bits=8, block_size=64)], ids=str)
def test_aligned_widths_are_quantised_like_those_that_are_not(quantisation: Quantisation) -> None:
    """The zeros that are added fill up a last block, and its scale stays; odd widths, so that there are some."""
    masks = Masks.random(harness.checkpoint("llama").config, 0.5, 1)
    odd = [{name: indices[: len(indices) // 2 * 2 - 1] for name, indices in b.sets().items()} for b in masks.blocks]
    masks = Masks.from_indices(odd, harness.checkpoint("llama").config)
    model = quantised_model("llama", masks, quantisation, target="onnx-cuda", align=32)
    inputs = {
        node.name: node.attributes["K"].as_int()
        for node in model.graph
        if node.op_type == "MatMulNBits" and "layers." in (node.name or "") and "o_proj" not in (node.name or "")
    }
    assert inputs and all(size % 32 == 0 for size in inputs.values()), inputs
    expected = harness.reference_logits("llama", masks, quantisation=quantisation)
    assert logit_error(harness.model_logits(model), expected) <= LIMITS["float32"]


@pytest.mark.parametrize("variant", ["llama-tied-biased", "phi", "opt"])
def test_what_was_asked_for_is_quantised_and_nothing_else(variant: str) -> None:
    masks = Masks.random(harness.checkpoint(variant).config, 0.5, 1)
    before = harness.operators(harness.rewritten(variant, masks, without=("tie-embeddings",))).count("MatMul")
    apart = {"without": ("fuse-gate-up",)}  # which only pays for integers
    blocks = quantised_model(variant, masks, INT4, **apart)
    assert harness.operators(blocks).count("MatMulNBits") == before - 1
    head = "MatMul" if variant == "phi" else "FusedMatMul"
    assert harness.operators(blocks, f"/lm_head/{head}") == [head]
    assert "GatherBlockQuantized" not in harness.operators(blocks)
    everything = quantised_model(variant, masks, EVERYTHING, **apart)
    assert harness.operators(everything).count("MatMulNBits") == before
    assert harness.operators(everything, "/embed_tokens/") == ["GatherBlockQuantized"]
    assert "MatMul" not in harness.operators(everything)


def test_names_widths_and_outputs_stay() -> None:
    masks = Masks.random(harness.checkpoint("llama").config, 0.5, 1)
    model = quantised_model("llama", masks, EVERYTHING)
    down = next(node for node in model.graph if node.name == "/model/layers.1/mlp/down_proj/MatMulNBits")
    mid = len(masks.blocks[1].sets()["mlp.mid"])
    assert down.metadata_props["dispc.reads"] == f"{mid} of 88"
    assert down.attributes["K"].as_int() == mid
    assert [v.name for v in down.inputs[1:] if v] == [f"model.layers.1.mlp.down_proj.weight.{part}" for part in PARTS]
    assert model.graph.outputs[0].name == "logits"


def test_quantising_twice_changes_nothing_the_second_time() -> None:
    masks = Masks.random(harness.checkpoint("opt").config, 0.5, 1)
    for quantisation in (INT8, EVERYTHING):
        model = quantised_model("opt", masks, quantisation)
        before = str(model)
        assert not QuantisePass(quantisation, harness.checkpoint("opt").config)(model).modified
        assert str(model) == before


def test_an_embedding_that_is_not_found_is_an_error_and_no_silent_omission() -> None:
    with pytest.raises(CompileError, match="pass quantise made"):
        QuantisePass(EVERYTHING, harness.checkpoint("opt").config)(harness.traced("llama"))


def compiled(variant: str, out: Path, quantisation: Quantisation, target: str = "onnx-cpu", **options: Any) -> Manifest:
    checkpoint = harness.checkpoint(variant)
    Masks.random(checkpoint.config, 0.5, 4).save(out.parent / "masks.safetensors", checkpoint.config)
    return compile_model(
        CompileOptions(
            model=checkpoint.directory,
            masks=out.parent / "masks.safetensors",
            output=out,
            target=target,
            quantisation=quantisation,
            **options,
        )
    )


@pytest.mark.parametrize(
    ("variant", "quantisation", "target", "options"),
    [
        ("qwen2-mixed-window", CPU_INT8, "onnx-cpu", {"verify_each": True}),
        ("phi", EVERYTHING, "onnx-cpu", {"padding": "left"}),
        ("llama-tied-biased", EVERYTHING, "onnx-cuda", {"dtype": "float16"}),
        ("opt", INT4, "onnx-cuda", {"dtype": "float16", "lowering": "canonical"}),
        ("phi", INT8, "onnx-cuda", {"dtype": "bfloat16", "align": 32}),
        ("opt", EVERYTHING, "onnx-cuda", {"dtype": "bfloat16"}),
    ],
)
def test_artifacts_pass_and_say_how_they_are_quantised(
    variant: str, quantisation: Quantisation, target: str, options: dict[str, Any], tmp_path: Path
) -> None:
    manifest = compiled(variant, tmp_path / "out", quantisation, target, **options)
    assert manifest.passed
    assert read_manifest(tmp_path / "out").quantisation == manifest.quantisation == quantisation
    outcome = command.run("inspect", tmp_path / "out", "--json")
    assert json.loads(outcome.out)["facts"]["quantised"] == str(quantisation)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantised") / "out"
    assert compiled("llama", out, EVERYTHING).passed
    return out


def double_a_scale(parts: dict[str, Any]) -> None:
    parts["scales"][0, 0] *= 2


def shift_a_zero_point(parts: dict[str, Any]) -> None:
    parts["zero_points"][0, 0] ^= 1


def swap_integers(parts: dict[str, Any]) -> None:
    first = parts["quantised"][0]
    parts["quantised"][0] = (first >> 4) | (first << 4)


@pytest.mark.parametrize(
    ("fault", "layer"),
    [
        (double_a_scale, "model.layers.1.mlp.down_proj"),
        (shift_a_zero_point, "model.layers.2.self_attn.o_proj"),
        (swap_integers, "lm_head"),
    ],
)
def test_a_single_wrong_value_is_found(fault: Any, layer: str, artifact: Path, tmp_path: Path) -> None:
    for file in artifact.iterdir():
        if not file.name.startswith("model.onnx"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model = ir.load(artifact / "model.onnx")
    values = {
        part: model.graph.initializers[f"{layer}.weight.{part}"] for part in ("quantised", "scales", "zero_points")
    }
    parts = {part: value.const_value.numpy().copy() for part, value in values.items() if value.const_value is not None}
    fault(parts)
    for part, value in values.items():
        value.const_value = ir.tensor(parts[part], name=value.name)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    report = check(tmp_path, harness.checkpoint("llama").directory, CheckOptions(quick=True))
    assert not {one.name: one.passed for one in report.checks}["prefill"]


def test_int8_activations_are_judged_by_a_limit_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validation = compiled("llama", tmp_path / "out", CPU_INT8).validation
    assert validation is not None
    figures = {one["name"]: one["figure"] for one in validation["checks"]}
    assert figures["int8 activations"] > LIMITS["float32"]
    monkeypatch.setattr(variants, "INT8_ACTIVATIONS_LIMIT", figures["int8 activations"] * 0.99)
    report = check(tmp_path / "out", harness.checkpoint("llama").directory, CheckOptions(quick=True))
    assert [one.name for one in report.checks if not one.passed] == ["int8 activations"]


@pytest.mark.parametrize(
    ("name", "target", "asked", "chosen"),
    [
        ("int8", "onnx-cpu", None, True),
        ("int8", "onnx-cpu", False, False),
        ("int8", "onnx-cuda", None, False),
        ("int4", "onnx-cpu", None, False),
        ("int4", "onnx-cpu", True, True),
    ],
)
def test_int8_activations_are_the_default_where_int8_weights_have_no_other_kernels(
    name: str, target: str, asked: bool | None, chosen: bool
) -> None:
    options: dict[str, Any] = dict(block_size=None, asymmetric=False, head=False, embedding=False)
    made = make_quantisation(name, target, int8_activations=asked, **options)
    assert made is not None
    assert made.int8_activations == chosen


def test_the_unrounded_reference_would_not_do() -> None:
    masks = Masks.random(harness.checkpoint("llama").config, 0.5, 1)
    found = harness.model_logits(quantised_model("llama", masks, INT8))
    assert logit_error(found, harness.reference_logits("llama", masks)) > LIMITS["float32"]


def test_verify_each_names_quantisation_when_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = rounding.round_weight

    def faulty(weight: harness.Array, quantisation: Quantisation, factor: None) -> rounding.Integers:
        integers = honest(weight, quantisation, factor)
        return replace(integers, scales=integers.scales * np.float32(1.01))

    monkeypatch.setattr(quantise, "round_weight", faulty)
    checkpoint = harness.checkpoint("llama")
    masks = Masks.random(checkpoint.config, 0.5, 2)
    passes = build_pipeline(make_plan("onnx-cpu", Choices(quantisation=INT4)), checkpoint, masks)
    with pytest.raises(CompileError, match="quantise changed the result"):
        run_pipeline(harness.traced("llama"), passes, make_verifier(checkpoint, masks, INT4))
