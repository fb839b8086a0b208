"""Families beyond those of the full matrix: each variant at the cheap tier, end to end once, and its own parts."""

import json
from pathlib import Path
from typing import Any

import command
import faults
import harness
import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from harness import TOLERANCE
from hypothesis import given, settings
from hypothesis import strategies as st
from sets import gates_of, widths
from torch import Tensor

from dispc.masks import Masks
from dispc.model.families import FAMILIES, find_family
from dispc.quantisation import Quantisation
from dispc.reference.masked import load_reference
from dispc.support.errors import UnsupportedModelError
from dispc.validate.checks.parity import DEFAULTS, logit_error

TARGETS = ("onnx-cpu", "onnx-cuda", "onnx")
SCOPES = ("full", "selected")
INT4 = Quantisation(bits=4, block_size=16, symmetric=True, head=False, embedding=False)
OPTIONS: tuple[dict[str, Any], ...] = (
    {"target": "onnx-cpu"},
    {"target": "onnx-cpu", "padding": "left"},
    {"target": "onnx-cpu", "lowering": "canonical"},
    {"target": "onnx-cuda", "align": 8},
    {"target": "onnx"},
)

ROUNDING = 2e-5
"""Of the logits' range: nobody's fault, however small the reference's own error at that position happens to be."""


def half(variant: str, scope: str, seed: int = 3) -> Masks:
    return Masks.random(harness.checkpoint(variant).config, 0.5, seed, norm_scope=scope)  # type: ignore[arg-type]


def error(variant: str, masks: Masks, **options: Any) -> float:
    found = harness.model_logits(harness.rewritten(variant, masks, **options))
    return logit_error(found, harness.reference_logits(variant, masks))


def test_every_family_has_a_variant() -> None:
    assert {model_type for model_type, _ in (tiny.VARIANTS | tiny.FURTHER).values()} == set(FAMILIES)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("variant", tiny.FURTHER)
def test_the_graph_of_every_target_is_the_masked_reference(variant: str, scope: str) -> None:
    masks = half(variant, scope)
    for target in TARGETS:
        assert error(variant, masks, target=target) <= TOLERANCE, target


@pytest.mark.parametrize("variant", tiny.FURTHER)
def test_the_unpruned_graph_is_the_dense_model(variant: str) -> None:
    config = harness.checkpoint(variant).config
    model = harness.rewritten(variant, Masks.dense(config))
    assert logit_error(harness.model_logits(model), harness.reference_logits(variant, None)) <= TOLERANCE


@pytest.mark.parametrize("variant", tiny.FURTHER)
def test_padded_batches_and_cached_steps_on_either_side(variant: str) -> None:
    masks = half(variant, "full")
    rows = [harness.TOKENS, harness.TOKENS[-4:], harness.TOKENS[2:11]]
    expected = harness.reference_rows(variant, masks, rows)
    for padding in ("left", "right"):
        found = harness.batch_logits(harness.rewritten(variant, masks, padding=padding), rows, padding)
        assert all(logit_error(*pair) <= TOLERANCE for pair in zip(found, expected, strict=True)), padding


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("number", "variant"), enumerate(tiny.FURTHER))
def test_a_compilation_of_every_variant_passes_its_validation(
    number: int, variant: str, target: str, tmp_path: Path
) -> None:
    """By the command line. Norm scopes take turns, and so do quantisation, and bfloat16 with padding on the left."""
    checkpoint, scope = harness.checkpoint(variant), SCOPES[(number + TARGETS.index(target)) % 2]
    half(variant, scope).save(tmp_path / "masks.safetensors", checkpoint.config)
    more: dict[str, tuple[str, ...]] = {
        "onnx-cpu": ("--quantize", "int4", "--block-size", "16"),
        "onnx-cuda": ("--dtype", "bfloat16", "--padding", "left"),
    }
    line = ("compile", checkpoint.directory, "--masks", tmp_path / "masks.safetensors", "-t", target, "--json")
    done = command.run(*line, "-o", tmp_path / "out", *(more.get(target, ()) if number % 2 else ()))
    assert done.code == 0, done
    assert json.loads(done.out)["validation"]["passed"]


@pytest.mark.parametrize("variant", tiny.FURTHER)
def test_four_bit_weights_of_every_variant_compute_what_torch_does_with_the_same(variant: str) -> None:
    for target, scope in zip(("onnx-cpu", "onnx-cuda"), SCOPES, strict=True):
        masks = half(variant, scope)
        model = harness.rewritten(variant, masks, target=target, dtype="float32", quantisation=INT4)
        expected = harness.reference_logits(variant, masks, quantisation=INT4)
        assert logit_error(harness.model_logits(model), expected) <= TOLERANCE, target
        assert "MatMulNBits" in harness.operators(model, "layers.1/")


@pytest.mark.parametrize("variant", tiny.FURTHER)
@given(data=st.data())
@settings(max_examples=6)
def test_any_widths_keep_the_function(variant: str, data: st.DataObject) -> None:
    masks = data.draw(widths(variant))
    options = data.draw(st.sampled_from(OPTIONS))
    found = harness.model_logits(harness.rewritten(variant, masks, **options))
    if logit_error(found, harness.reference_logits(variant, masks)) > ROUNDING:
        assert harness.times_own(variant, masks, [harness.TOKENS], [found]) <= DEFAULTS.error


@pytest.mark.parametrize("variant", tiny.FURTHER)
def test_what_learning_trains_is_what_the_compiler_compiles(variant: str) -> None:
    from dispc.learn.objective import GatedModel, next_token_loss

    checkpoint = harness.checkpoint(variant)
    ids = torch.from_numpy(harness.TOKENS)[None]
    for scope in SCOPES:
        masks = half(variant, scope)
        gated = GatedModel(load_reference(checkpoint, None), checkpoint.config, masks.norm_scope)
        gates = gates_of(masks).requires_grad_()
        loss = gated.loss(gates, ids)
        expected = next_token_loss(torch.from_numpy(harness.reference_logits(variant, masks))[None], ids)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        (gradient,) = torch.autograd.grad(loss, gates)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
        with torch.no_grad():
            step = gates - 1e-3 * gradient / gradient.norm()
            assert gated.loss(step, ids) < loss


def rms(x: Tensor, weight: Tensor, epsilon: float, count: int) -> Tensor:
    """An RMS norm that divides by `count` positions."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / count + epsilon) * weight


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("variant", ["gemma2", "gemma3", "olmo2"])
def test_the_norm_behind_a_sub_layer_runs_over_all_or_over_the_written_positions(variant: str, scope: str) -> None:
    """The definition, with index selection: rows are selected before the norm, nothing is added elsewhere."""
    checkpoint = harness.checkpoint(variant)
    family, d = checkpoint.family, checkpoint.config.hidden_size
    masks = half(variant, scope, seed=11)
    sets = masks.blocks[1].mlp
    assert sets.mid is not None
    read, mid, write = (torch.from_numpy(indices) for indices in (sets.read, sets.mid, sets.write))
    masked, dense = (load_reference(checkpoint, m).get_submodule(family.block(1)) for m in (masks, None))
    x = torch.randn(3, 5, d)

    def weight(norm: Any) -> Tensor:
        return norm.weight + family.norm.offset

    h = x[..., read]
    if family.mlp_norm:
        before = dense.get_submodule(family.mlp_norm)
        kept = x if scope == "full" else h
        variance = kept.square().mean(-1, keepdim=True) + family.norm.epsilon_of(before)
        h = h * torch.rsqrt(variance) * weight(before)[read]
    mlp = dense.mlp
    h = mlp.act_fn(h @ mlp.gate_proj.weight[mid][:, read].T) * (h @ mlp.up_proj.weight[mid][:, read].T)
    y = h @ mlp.down_proj.weight[write][:, mid].T
    after = dense.post_feedforward_layernorm
    y = rms(y, weight(after)[write], family.norm.epsilon_of(after), d if scope == "full" else len(write))
    expected = torch.zeros_like(x).index_add(-1, write, y)

    entering = masked.get_submodule(family.mlp_norm)(x) if family.mlp_norm else x
    found = masked.post_feedforward_layernorm(masked.mlp(entering))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["phi3", "gpt-neox"])
def test_separated_projections_compute_what_the_packed_ones_do(variant: str) -> None:
    checkpoint = harness.checkpoint(variant)
    packed = checkpoint.load_model(torch.float32)
    with torch.inference_mode():
        expected = packed(input_ids=torch.from_numpy(harness.TOKENS)[None]).logits[0].numpy()
    np.testing.assert_allclose(harness.reference_logits(variant, None), expected, atol=1e-5)
    family = checkpoint.family
    rows = [checkpoint.find(f"{family.block(1)}.{name}.weight").read() for name in family.attention_reads]
    whole = packed.get_submodule(f"{family.block(1)}.{family.packed[0].module}").weight
    assert sorted(map(tuple, torch.cat(rows).tolist())) == sorted(map(tuple, whole.tolist()))


def wrong_epsilon(model: ir.Model) -> None:
    for node in model.graph:
        if "post_feedforward_layernorm" in (node.name or ""):
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1.0)


def global_rotary_everywhere(model: ir.Model) -> None:
    for name in ("cos_cache", "sin_cache"):
        faults.replace(model, f"{name}_1", faults.initializer(model, name))


def halves_for_neighbours(model: ir.Model) -> None:
    for node in model.graph:
        node.attributes.pop("rotary_interleaved", None)
        node.attributes.pop("interleaved", None)


def no_softcap(model: ir.Model) -> None:
    for node in model.graph:
        node.attributes.pop("softcap", None)


def rotate_everything(model: ir.Model) -> None:
    kernels = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    rotated = next(node for node in kernels if "do_rotary" in node.attributes)
    for node in kernels:
        node.resize_inputs(9)
        for position in (7, 8):
            node.replace_input_with(position, rotated.inputs[position])
        node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)


def forget_the_residual_multiplier(model: ir.Model) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    faults.replace(model, name, faults.initializer(model, name) / np.float32(0.4))


@pytest.mark.parametrize(
    ("variant", "fault"),
    [
        ("gemma2", wrong_epsilon),
        ("gemma2", no_softcap),
        ("gemma3", global_rotary_everywhere),
        ("cohere", halves_for_neighbours),
        ("smollm3", rotate_everything),
        ("granite", forget_the_residual_multiplier),
    ],
)
def test_what_a_family_needs_is_missed_when_it_is_not_there(variant: str, fault: faults.Fault) -> None:
    masks = half(variant, "full")
    model = harness.rewritten(variant, masks)
    fault(model)
    assert logit_error(harness.model_logits(model), harness.reference_logits(variant, masks)) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"_sliding_window_pattern": 4}, "sliding_window_pattern"),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "longrope"),
        ("phi3", {"rope_scaling": {"type": "su", "long_factor": [1.0]}}, "longrope"),
        ("starcoder2", {"norm_type": "rms"}, "norm_type"),
        ("starcoder2", {"mlp_type": "gated"}, "mlp_type"),
        ("starcoder2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ],
)
def test_options_that_are_not_done_are_refused_by_name(model_type: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        find_family({"model_type": model_type} | options)


def test_multipliers_leave_no_node_but_those_of_tied_embeddings() -> None:
    """Of Granite: the residual's and the logits' are in the weights; a tied head keeps its own, in front."""
    for variant, nodes in (("granite", 1), ("granite-tied", 2)):
        graph = harness.rewritten(variant, half(variant, "full")).graph
        scalars = [n for n in graph if n.op_type in ("Mul", "Div") and _by_a_number(n)]
        assert len(scalars) == nodes, [n.name for n in scalars]


def _by_a_number(node: ir.Node) -> bool:
    return any(v is not None and v.const_value is not None and v.const_value.size == 1 for v in node.inputs)
