"""The passes that make it fast: the same result with and without each, and each does what its docstring shows."""

from pathlib import Path
from typing import Any

import harness
import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from harness import TOLERANCE
from hypothesis import given, settings
from hypothesis import strategies as st
from sets import half, masks_of, targets_of, widths

from dispc.export.trace import trace
from dispc.lowerings import LOWERINGS
from dispc.masks import Masks
from dispc.passes.common.canonical import find_writes
from dispc.passes.pipeline import build_pipeline, run_pipeline
from dispc.plan import FUSIONS, Choices, make_plan
from dispc.reference.masked import load_reference
from dispc.runtime.session import Runner, open_session
from dispc.selection import sets_to_fill
from dispc.support.errors import CompileError
from dispc.validate.checks.parity import DEFAULTS, logit_error
from dispc.validate.client import Batch

COUNTED_BY_MASKS = (
    "align-widths",
    "fill-zeros",
    "inverse-gather",
    "feature-extractor",
    "lower-attention",
    "fuse-rotary",
    "fuse-qkv",
    "fuse-gate-up",
    "fuse-skip-norm",
    "tie-embeddings",
)
"""Passes that know from the masks what there is to do, and so fail when it is done already (test_fusion_counts.py)."""


def error(variant: str, masks: Masks, **options: Any) -> float:
    found = harness.model_logits(harness.rewritten(variant, masks, **options))
    expected = harness.reference_logits(variant, masks)
    return logit_error(found, expected[[4, -1]] if options.get("last_logits") else expected)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize("without", FUSIONS)
def test_a_model_without_one_of_the_fusions_computes_the_same(variant: str, without: str) -> None:
    for target in ("onnx-cpu", "onnx-cuda"):  # of the latter the graph in float32, which the CPU can run
        assert error(variant, half(variant), target=target, without=(without,)) <= TOLERANCE


@pytest.mark.parametrize("variant", tiny.RARE)
@pytest.mark.parametrize("without", [(), ("fuse-activations",), ("fuse-rotary",)], ids=str)
def test_rare_activations_and_rotary_scalings_too(variant: str, without: tuple[str, ...]) -> None:
    for target in ("onnx-cpu", "onnx-cuda"):
        assert error(variant, half(variant), target=target, without=without) <= TOLERANCE


@pytest.mark.parametrize(
    ("variant", "like"),
    [("llama-linear-rope", "llama"), ("llama-yarn", "llama"), ("phi-gelu", "phi"), ("opt-gelu", "opt")],
)
def test_a_rare_variant_is_what_its_name_says(variant: str, like: str) -> None:
    """Otherwise the test above would not try what it seems to."""
    rare, usual = (harness.rewritten(name, half(like)) for name in (variant, like))
    if "rope" in variant or "yarn" in variant:
        tables = [np.asarray(model.graph.initializers["cos_cache"].const_value) for model in (rare, usual)]
        assert tables[0].shape == tables[1].shape and not np.allclose(tables[0][1:], tables[1][1:])
        assert "RotaryEmbedding" not in harness.operators(rare)
    else:
        assert harness.operators(rare).count("BiasGelu") == harness.checkpoint(variant).config.num_hidden_layers
        assert not {"Gelu", "FastGelu", "Relu"} & {*harness.operators(rare)}


@pytest.mark.parametrize("lowering", LOWERINGS)
@given(data=st.data())
@settings(max_examples=16)
def test_any_family_widths_and_options_keep_the_function_in_padded_batches(lowering: str, data: st.DataObject) -> None:
    variant = data.draw(st.sampled_from([*tiny.VARIANTS, *tiny.FURTHER, *tiny.RARE]))
    masks = data.draw(widths(variant))
    options = {
        "target": data.draw(st.sampled_from(targets_of(lowering))),
        "align": data.draw(st.sampled_from([1, 8, 16])),
        "last_logits": data.draw(st.booleans()),
        "without": tuple(sorted(data.draw(st.sets(st.sampled_from(FUSIONS), max_size=3)))),
    }
    options["padding"] = data.draw(st.sampled_from(["left", "right"])) if options["target"] != "onnx" else "left"
    model = harness.rewritten(variant, masks, lowering=lowering, **options)
    if options["last_logits"]:
        logits, last = harness.model_logits(model), [4, len(harness.TOKENS) - 1]
        assert harness.times_own(variant, masks, [harness.TOKENS], [logits], at=last) <= DEFAULTS.error
        return
    lengths = data.draw(st.lists(st.integers(2, len(harness.TOKENS)), min_size=2, max_size=3))
    rows = [harness.TOKENS[-length:] for length in lengths]
    found = harness.batch_logits(model, rows, options["padding"])
    assert harness.times_own(variant, masks, rows, found) <= DEFAULTS.error


@pytest.mark.parametrize("target", ["onnx-cuda", "onnx-cpu"])
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2"])
def test_a_gated_block_is_left_with_what_it_needs(variant: str, target: str) -> None:
    model = harness.rewritten(variant, half(variant), target=target, lowering="inverse-gather")
    operators = harness.operators(model, "layers.1/")
    packed = target == "onnx-cuda"
    counts = {name: operators.count(name) for name in set(operators)} | {"Transpose": operators.count("Transpose")}
    counts.pop("Add", None)  # the biases of Qwen2
    assert counts == {
        "SkipSimplifiedLayerNormalization": 2,
        "Gather": 4,
        "MatMul": 4 if packed else 5,
        "GroupQueryAttention": 1,
        "QuickGelu": 1,
        "Mul": 1,
        "Transpose": 0,
        **({"Split": 1} if packed else {}),
    }


@pytest.mark.parametrize(
    ("variant", "fused"), [("phi", ("FastGelu",)), ("phi-wide-rotary", ("FastGelu",)), ("opt", ("Relu",))]
)
def test_an_ungated_block_is_left_with_what_it_needs(variant: str, fused: tuple[str, ...]) -> None:
    operators = harness.operators(harness.rewritten(variant, half(variant), lowering="inverse-gather"), "layers.1/")
    assert operators.count("SkipLayerNormalization") == (2 if variant == "opt" else 1)
    assert operators.count("MatMul") == (6 if variant == "phi" else 4)
    assert all(operators.count(name) == 1 for name in fused)
    assert "LayerNormalization" not in operators


def test_a_rotation_that_the_kernel_cannot_do_stays_a_node_and_keeps_its_positions() -> None:
    inputs = {
        variant: [value.name for value in harness.rewritten(variant, half(variant)).graph.inputs]
        for variant in ("phi", "phi-wide-rotary", "llama", "opt")
    }
    kept = {variant for variant, names in inputs.items() if "position_ids" in names}
    assert kept == {"phi", "opt"}  # OPT looks its positions up in a table


def test_the_kernel_still_counts_the_positions_of_left_padded_rows_wrong(tmp_path: Path) -> None:
    """Why rotary is not fused for them. When this fails, ONNX Runtime has learned it: FuseRotaryPass can do it then."""
    model = harness.rewritten("llama", half("llama"), padding="left")
    positions = next(value for value in model.graph.inputs if value.name == "position_ids")
    ir.save(model, tmp_path / "apart.onnx")
    for kernel in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
        query, key = (value.producer() for value in kernel.inputs[:2] if value is not None)
        assert query is not None and key is not None and query.op_type == key.op_type == "RotaryEmbedding"
        tables = query.inputs[2:4] if query.domain else query.inputs[1:3]  # com.microsoft's has the positions in front
        inputs = (query.inputs[0], key.inputs[0], *tables, positions)
        for place, value in zip((0, 1, 7, 8, 9), inputs, strict=True):
            kernel.replace_input_with(place, value)
        kernel.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
    ir.save(model, tmp_path / "fused.onnx")
    found = []
    for name in ("apart.onnx", "fused.onnx"):
        rows = [harness.TOKENS[: length + 1] for length in (9, 3)]
        batch = Batch(Runner(open_session(tmp_path / name)), rows, "left", compact=False).prefill([9, 3]).extend()
        found.append(np.stack([row.outputs["logits"][-2:] for row in batch.outputs()]))
    (long, short), (long_fused, short_fused) = found
    assert logit_error(long_fused, long) <= TOLERANCE  # a row without padding is right
    assert logit_error(short_fused[0], short[0]) <= TOLERANCE  # in a prompt only distances count
    assert logit_error(short_fused[1], short[1]) > 1000 * TOLERANCE


@pytest.mark.parametrize("variant", ["llama", "phi-wide-rotary", "opt"])
def test_a_packed_projection_holds_the_three_side_by_side(variant: str) -> None:
    masks = half(variant)
    family = harness.checkpoint(variant).family
    packed = harness.rewritten(variant, masks).graph.initializers
    apart = harness.rewritten(variant, masks, without=("fuse-qkv",)).graph.initializers
    for suffix in ("weight", "bias"):
        parts = [apart.get(f"{family.block(1)}.{name}.{suffix}") for name in family.attention_reads]
        if None in parts:
            assert suffix == "bias"
            continue
        values = [part.const_value.numpy() for part in parts if part is not None and part.const_value is not None]
        module = f"{family.block(1)}.{family.query}".rpartition(".")[0]
        whole = packed[f"{module}.qkv_proj.{suffix}"].const_value
        assert whole is not None
        np.testing.assert_array_equal(whole.numpy(), np.concatenate(values, axis=-1))


def test_nodes_made_by_patterns_are_named_after_their_module() -> None:
    names = [node.name or "" for node in harness.rewritten("llama", half("llama"), lowering="inverse-gather").graph]
    assert len(set(names)) == len(names)
    assert "/model/layers.1/mlp/act_fn/QuickGelu" in names
    assert "/model/layers.1/post_attention_layernorm/SkipSimplifiedLayerNormalization" in names
    assert all(name.startswith("/") for name in names)


@pytest.mark.parametrize("variant", ["llama-tied-biased", "opt"])
@pytest.mark.parametrize("target", ["onnx-cpu", "onnx"])
def test_a_tied_embedding_is_stored_once(variant: str, target: str) -> None:
    config = harness.checkpoint(variant).config
    graph = harness.rewritten(variant, half(variant), target=target).graph
    sizes = [value.const_value.size for value in graph.initializers.values() if value.const_value is not None]
    assert sizes.count(config.vocab_size * config.hidden_size) == 1


def test_an_embedding_that_is_not_tied_is_left_alone() -> None:
    operators = harness.operators(harness.rewritten("llama", half("llama")))
    assert "FusedMatMul" not in operators


@pytest.mark.parametrize("multiple", [8, 16])
def test_aligned_widths_are_multiples(multiple: int) -> None:
    masks = half("llama", seed=4)
    graph = harness.rewritten("llama", masks, target="onnx-cuda", align=multiple).graph
    config = harness.checkpoint("llama").config
    for index in range(config.num_hidden_layers):
        for name in ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            value = graph.initializers[f"model.layers.{index}.{name}.weight"].const_value
            assert value is not None
            assert int(value.shape[0]) % multiple == 0, name


@pytest.mark.parametrize("lowering", ["zero-filled", "feature-extractor"])
@pytest.mark.parametrize("missing", [1, 2, 6, 7, 20])
@pytest.mark.parametrize("variant", ["llama", "phi", "opt"])
def test_sets_that_are_not_worth_an_index_list_are_filled_with_zeros_and_no_others(
    variant: str, missing: int, lowering: str
) -> None:
    checkpoint = harness.checkpoint(variant)
    config = checkpoint.config
    kept = np.arange(missing, config.hidden_size)
    full = dict.fromkeys(("attention.read", "attention.write", "mlp.read", "mlp.write"), kept)
    masks = Masks.from_indices([full] * config.num_hidden_layers, config)
    graph = harness.rewritten(variant, masks, lowering=lowering).graph
    places = [(n.name or "").rpartition("/")[0] for n in graph if n.op_type in ("Gather", "ArrayFeatureExtractor")]
    filled = sets_to_fill(masks, config, make_plan("onnx-cpu").costs)
    selected = [place for place in places if place.endswith(("/read", "/write"))]
    assert len(selected) == 4 * config.num_hidden_layers - len(filled)
    assert bool(filled) == (missing < 20)
    assert error(variant, masks, lowering=lowering) < TOLERANCE


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("norm_scope", ["full", "selected"])
@pytest.mark.parametrize("variant", ["llama", "phi", "opt"])
def test_extracted_features_are_gathered_ones_to_the_last_bit(variant: str, norm_scope: str, padding: str) -> None:
    masks = half(variant, norm_scope=norm_scope)
    options = {"padding": padding, "without": ("fill-zeros",)}
    extracted = harness.rewritten(variant, masks, lowering="feature-extractor", **options)
    gathered = harness.rewritten(variant, masks, lowering="inverse-gather", **options)
    names = {place: harness.operators(extracted, place) for place in ("/read/", "/write/")}
    assert all("ArrayFeatureExtractor" in found and "Gather" not in found for found in names.values())
    for optimise in (False, True):
        results = [harness.model_logits(model, optimise=optimise) for model in (extracted, gathered)]
        np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("variant", ["llama-tied-biased", "phi", "opt"])
@pytest.mark.parametrize("target", ["onnx-cuda", "onnx-cpu", "onnx"])
def test_passes_that_have_nothing_left_to_do_change_nothing(variant: str, target: str) -> None:
    masks = half(variant)
    model = harness.rewritten(variant, masks, target=target)
    before = str(model)
    passes = build_pipeline(make_plan(target), harness.checkpoint(variant), masks)[2:]
    passes = [item for item in passes if item.name not in COUNTED_BY_MASKS]
    assert not any(record.rewrites for record in run_pipeline(model, passes))
    assert str(model) == before


def test_logits_of_the_last_token_are_those_of_each_rows_end(tmp_path: Path) -> None:
    """Right padding: a row's last token is not the last position."""
    masks = half("llama")
    rows = [harness.TOKENS[:3], harness.TOKENS[:7], harness.TOKENS[4:5]]
    ids, mask = np.zeros((2, 3, 7), dtype=np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    ir.save(harness.rewritten("llama", masks, last_logits=True), tmp_path / "model.onnx")
    runner = Runner(open_session(tmp_path / "model.onnx"))
    logits, _ = runner.run(ids, mask, np.maximum(mask.cumsum(1) - 1, 0), runner.empty_caches(3))
    assert logits.shape[1] == 1
    for row, tokens in enumerate(rows):
        assert logit_error(logits[row, 0], harness.reference_logits("llama", masks, tokens)[-1]) <= TOLERANCE


def test_a_scatter_that_is_no_canonical_write_is_named() -> None:
    model = harness.rewritten("llama", half("llama"), lowering="canonical")
    scatter = next(node for node in model.graph if node.op_type == "ScatterND")
    scatter.replace_input_with(2, scatter.inputs[0].producer().inputs[0])  # type: ignore[union-attr]
    with pytest.raises(CompileError, match="write/ScatterND"):
        find_writes(model.graph)


@pytest.mark.parametrize(("target", "padding"), [("onnx-cpu", "right"), ("onnx-cpu", "left"), ("onnx-cuda", "right")])
def test_an_artifact_with_last_logits_is_judged_at_every_position_and_as_it_is(
    target: str, padding: str, tmp_path: Path
) -> None:
    from dispc.compiler import CompileOptions, compile_model

    checkpoint = harness.checkpoint("llama-tied-biased")
    half("llama-tied-biased").save(tmp_path / "masks.safetensors", checkpoint.config)
    manifest = compile_model(
        CompileOptions(
            model=checkpoint.directory,
            masks=tmp_path / "masks.safetensors",
            output=tmp_path / "out",
            target=target,
            padding=padding,
            last_logits=True,
            verify_each=True,
        )
    )
    assert manifest.validation is not None
    checks = {check["name"]: check for check in manifest.validation["checks"]}
    assert manifest.passed
    assert manifest.logits == "last"
    assert {"prefill", "last logits"} <= set(checks)


@pytest.mark.parametrize("variant", ["llama", "phi", "opt"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"without": (name,)} for name in FUSIONS),
        {"lowering": "zero-filled"},
        {"align": 16},
        {"padding": "left"},
        {"lowering": "zero-filled", "align": 16, "padding": "left"},
    ],
    ids=str,
)
def test_in_float16_no_pass_costs_more_than_float16_itself(variant: str, options: dict[str, Any]) -> None:
    """The graph for CUDA, run by the CPU's float16 kernels; the budget is torch's error in float16, four times."""
    checkpoint, masks = harness.checkpoint(variant), masks_of(variant)
    model = trace(checkpoint, torch.float16)
    plan = make_plan("onnx-cuda", Choices(**options))
    run_pipeline(model, build_pipeline(plan, checkpoint, masks))
    rows = [harness.TOKENS, harness.TOKENS[-4:]]
    expected = np.concatenate(harness.reference_rows(variant, masks, rows))
    halves = load_reference(checkpoint, masks, torch.float16)
    own = np.concatenate(harness.rows_of(halves, rows))
    found = np.concatenate(harness.batch_logits(model, rows, plan.padding))
    assert logit_error(found, expected) <= 4 * logit_error(own, expected)
