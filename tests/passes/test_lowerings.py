"""What lowerings, aligned and filled widths and last logits make of the graph."""

from pathlib import Path

import harness
import numpy as np
import onnx_ir as ir
import pytest
from harness import TOLERANCE
from sets import half

from dispc.masks import Masks
from dispc.passes.common.canonical import find_writes
from dispc.plan import make_plan
from dispc.runtime.session import Runner, open_session
from dispc.selection import sets_to_fill
from dispc.support.errors import CompileError
from dispc.validate.checks.parity import logit_error


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
    model = harness.rewritten(variant, masks, lowering=lowering)
    places = [
        (n.name or "").rpartition("/")[0] for n in model.graph if n.op_type in ("Gather", "ArrayFeatureExtractor")
    ]
    filled = sets_to_fill(masks, config, make_plan("onnx-cpu").costs)
    selected = [place for place in places if place.endswith(("/read", "/write"))]
    assert len(selected) == 4 * config.num_hidden_layers - len(filled)
    assert bool(filled) == (missing < 20)
    assert logit_error(harness.model_logits(model), harness.reference_logits(variant, masks)) < TOLERANCE


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
