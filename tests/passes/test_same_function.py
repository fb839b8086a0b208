"""Whatever passes, widths and options there are, the rewritten graph computes the same function."""

from typing import Any

import harness
import numpy as np
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
from dispc.passes.pipeline import build_pipeline, run_pipeline
from dispc.plan import Choices, make_plan
from dispc.reference.masked import load_reference
from dispc.targets import FUSIONS
from dispc.validate.checks.parity import DEFAULTS, logit_error

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
