"""Quantisation: the graph computes what torch computes with the same weights rounded, whatever widths are left."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import command
import harness
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compile import widths

from dispc.compiler import CompileOptions, compile_model
from dispc.errors import CompileError
from dispc.export.write import WORKERS, save_model
from dispc.masks import Masks
from dispc.passes import quantise
from dispc.passes.pipeline import build_pipeline, run_pipeline
from dispc.passes.quantise import QuantisedWeight, QuantisePass
from dispc.quantisation import BLOCK_SIZES, Quantisation, make_quantisation
from dispc.quantised_reference import round_blocks
from dispc.targets import Choices, make_plan
from dispc.validate import parity
from dispc.validate.judge import check
from dispc.validate.parity import LIMITS, logit_error
from dispc.validate.session import open_session
from dispc.validate.verify import make_verifier
from dispc.weights import LazyWeight

EMBEDDING = "model.embed_tokens.weight"
INT4 = Quantisation(bits=4, block_size=32, symmetric=True, head=False, embedding=False)
INT8 = Quantisation(bits=8, block_size=32, symmetric=True, head=False, embedding=False)
CPU_INT8 = replace(INT8, int8_activations=True)
EVERYTHING = Quantisation(bits=4, block_size=16, symmetric=False, head=True, embedding=True)
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
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 9)), quantisation=QUANTISATIONS,
    dtype=st.sampled_from(list(DTYPES)), rows=st.booleans(), coarse=st.booleans(), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
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


def quantised_model(variant: str, masks: Masks, quantisation: Quantisation, **options: Any) -> ir.Model:
    return harness.rewritten(variant, masks, quantisation=quantisation, **options)


@pytest.mark.parametrize("variant", ["llama-tied-biased", "phi", "opt"])
@given(data=st.data())
@settings(max_examples=8)
def test_the_graph_computes_the_rounded_reference_whatever_the_widths(variant: str, data: st.DataObject) -> None:
    masks, quantisation = data.draw(widths(variant)), data.draw(QUANTISATIONS)
    options = data.draw(st.sampled_from([{}, {"padding": "left"}, {"lowering": "canonical"}]))
    found = harness.model_logits(quantised_model(variant, masks, quantisation, **options))
    expected = harness.reference_logits(variant, masks, quantisation=quantisation)
    assert logit_error(found, expected) <= LIMITS["float32"]


@pytest.mark.parametrize("variant", ["llama-tied-biased", "phi", "opt"])
def test_what_was_asked_for_is_quantised_and_nothing_else(variant: str) -> None:
    masks = Masks.random(harness.checkpoint(variant).config, 0.5, 1)
    before = harness.operators(harness.rewritten(variant, masks, without=("tie-embeddings",))).count("MatMul")
    blocks = quantised_model(variant, masks, INT4)
    assert harness.operators(blocks).count("MatMulNBits") == before - 1
    head = "MatMul" if variant == "phi" else "FusedMatMul"
    assert harness.operators(blocks, f"/lm_head/{head}") == [head]
    assert "GatherBlockQuantized" not in harness.operators(blocks)
    everything = quantised_model(variant, masks, EVERYTHING)
    assert harness.operators(everything).count("MatMulNBits") == before
    assert harness.operators(everything, "/embed_tokens/") == ["GatherBlockQuantized"]
    assert "MatMul" not in harness.operators(everything)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize("variant", ["llama-tied-biased", "opt"])
def test_a_tied_embedding_is_quantised_once_and_read_as_it_is_stored(
    variant: str, bits: int, symmetric: bool, tmp_path: Path
) -> None:
    """Two copies would hold the same bytes; the Reshape between them must be gone before the first token."""
    quantisation = Quantisation(bits=bits, block_size=16, symmetric=symmetric, head=True, embedding=True)
    masks = Masks.random(harness.checkpoint(variant).config, 0.5, 1)
    once = quantised_model(variant, masks, quantisation)
    twice = quantised_model(variant, masks, quantisation, without=("tie-embeddings",))
    assert not [name for name in once.graph.initializers if name.startswith("lm_head.weight")]
    np.testing.assert_array_equal(harness.model_logits(once), harness.model_logits(twice))
    save_model(once, tmp_path / "model.onnx")
    open_session(tmp_path / "model.onnx", optimised_model=tmp_path / "optimised.onnx")
    assert "Reshape" not in [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]


def test_a_tied_embedding_whose_rows_end_within_a_block_is_stored_twice() -> None:
    masks = Masks.random(harness.checkpoint("llama-tied-biased").config, 0.5, 1)
    graph = quantised_model("llama-tied-biased", masks, replace(EVERYTHING, block_size=32)).graph  # 48 wide
    assert {"lm_head.weight.quantised", f"{EMBEDDING}.quantised"} <= {*graph.initializers}


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
        assert not QuantisePass(quantisation, "model.decoder.embed_tokens.weight")(model).modified
        assert str(model) == before


def test_an_embedding_that_is_not_found_is_an_error_and_no_silent_omission() -> None:
    with pytest.raises(CompileError, match="pass quantise made"):
        QuantisePass(EVERYTHING, "model.elsewhere.weight")(harness.traced("llama"))


def compiled(
    variant: str, out: Path, quantisation: Quantisation, target: str = "onnx-cpu", **options: Any
) -> dict[str, Any]:
    checkpoint = harness.checkpoint(variant)
    Masks.random(checkpoint.config, 0.5, 4).save(out.parent / "masks.safetensors", checkpoint.config)
    return compile_model(
        CompileOptions(
            model=checkpoint.directory, masks=out.parent / "masks.safetensors", output=out, target=target,
            quantisation=quantisation, **options,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "quantisation", "target", "options"),
    [
        ("qwen2-mixed-window", CPU_INT8, "onnx-cpu", {"verify_each": True}),
        ("phi", EVERYTHING, "onnx-cpu", {"padding": "left"}),
        ("llama-tied-biased", EVERYTHING, "onnx-cuda", {"dtype": "float16"}),
        ("opt", INT4, "onnx-cuda", {"dtype": "float16", "lowering": "canonical"}),
        ("phi", INT8, "onnx-cuda", {"dtype": "bfloat16"}),
        ("opt", EVERYTHING, "onnx-cuda", {"dtype": "bfloat16"}),
    ],
)
def test_artifacts_pass_and_say_how_they_are_quantised(
    variant: str, quantisation: Quantisation, target: str, options: dict[str, Any], tmp_path: Path
) -> None:
    manifest = compiled(variant, tmp_path / "out", quantisation, target, **options)
    assert manifest["validation"]["passed"]
    assert Quantisation(**json.loads((tmp_path / "out" / "dispc.json").read_text())["quantisation"]) == quantisation
    outcome = command.run("inspect", tmp_path / "out", "--json")
    assert json.loads(outcome.out)["facts"]["quantised"] == str(quantisation)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantised") / "out"
    assert compiled("llama", out, EVERYTHING)["validation"]["passed"]
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
    report = check(tmp_path, harness.checkpoint("llama").directory, quick=True)
    assert not {one.name: one.passed for one in report.checks}["prefill"]


def test_int8_activations_are_judged_by_a_limit_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = compiled("llama", tmp_path / "out", CPU_INT8)["validation"]["checks"]
    figures = {one["name"]: one["figure"] for one in checks}
    assert figures["int8 activations"] > LIMITS["float32"]
    monkeypatch.setattr(parity, "INT8_ACTIVATIONS_LIMIT", figures["int8 activations"] * 0.99)
    report = check(tmp_path / "out", harness.checkpoint("llama").directory, quick=True)
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
    honest = quantise.quantise

    def faulty(weight: harness.Array, quantisation: Quantisation) -> tuple[harness.Array, ...]:
        integers, scales, zero_points = honest(weight, quantisation)
        return integers, scales * np.float32(1.01), zero_points

    monkeypatch.setattr(quantise, "quantise", faulty)
    checkpoint = harness.checkpoint("llama")
    masks = Masks.random(checkpoint.config, 0.5, 2)
    passes = build_pipeline(make_plan("onnx-cpu", Choices(quantisation=INT4)), checkpoint, masks)
    with pytest.raises(CompileError, match="quantise changed the result"):
        run_pipeline(harness.traced("llama"), passes, make_verifier(checkpoint, masks, INT4))


def test_weights_are_read_while_they_are_written_once_each_and_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[str] = []
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, made = 0, []
    honest = LazyWeight.evaluate

    def counted(self: LazyWeight, out: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal most
        value = honest(self, out)
        read.append(self.name or "")
        alive.add(value)
        most = max(most, len(alive))
        return value

    class Watched(QuantisedWeight):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(LazyWeight, "evaluate", counted)
    monkeypatch.setattr(quantise, "QuantisedWeight", Watched)
    model = quantised_model("llama", Masks.dense(harness.checkpoint("llama").config), EVERYTHING)
    assert not read
    save_model(model, tmp_path / "model.onnx")
    assert len(made) == 17  # 5 projections (one of them packed) in each of 3 blocks, LM head, embedding
    projections = [name for name in read if "_proj." in name or name in ("lm_head.weight", EMBEDDING)]
    assert len(projections) == len(set(projections)) == 23
    assert most <= WORKERS
    assert not any(weight.waiting for weight in made)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("variant", "embeddings", "without"),
    [("llama", 2, ()), ("llama-tied-biased", 1, ()), ("llama-tied-biased", 2, ("tie-embeddings",))],
)
def test_the_file_shrinks_to_the_bits_and_their_scales(
    variant: str, embeddings: int, without: tuple[str, ...], bits: int, tmp_path: Path
) -> None:
    quantisation = Quantisation(bits=bits, block_size=16, symmetric=True, head=True, embedding=True)
    config = harness.checkpoint(variant).config
    model = quantised_model(variant, Masks.dense(config), quantisation, without=without)
    save_model(model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = sum(len(t.raw_data) for t in graph.initializer if t.name.endswith((".quantised", ".scales")))
    weights = config.block_parameters * config.num_hidden_layers + embeddings * config.vocab_size * config.hidden_size
    padded = config.hidden_size * (-config.intermediate_size % 16) * config.num_hidden_layers  # down_proj's last blocks
    assert stored == (weights + padded) * (bits + 32 / 16) / 8
