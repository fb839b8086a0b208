"""Each pass by itself: what it leaves unchanged, what it must count, and what it must refuse."""

from dataclasses import replace
from typing import Any

import harness
import numpy as np
import onnx_ir as ir
import pytest
import tiny
from harness import node
from hypothesis import given
from hypothesis import strategies as st

from dispc.masks import Masks
from dispc.passes.base import RewritePass
from dispc.passes.common.blocks import BlockFinder
from dispc.passes.common.unroll import UnrollPass
from dispc.passes.lower.inverse_gather import inverse_index
from dispc.passes.lower.lower_attention import LowerAttentionPass
from dispc.passes.pipeline import build_pipeline, pipeline_line, run_pipeline
from dispc.passes.prune.prune_blocks import PruneBlocksPass
from dispc.plan import Choices, make_plan
from dispc.quantisation import Quantisation
from dispc.support.errors import CompileError
from dispc.support.graph import consumers
from dispc.targets import FUSIONS
from dispc.validate.checks import verify
from dispc.validate.checks.parity import LIMITS, logit_error
from dispc.validate.checks.verify import make_verifier


def unrolled(variant: str) -> ir.Model:
    model = harness.traced(variant)
    UnrollPass(harness.checkpoint(variant))(model)
    return model


def find_blocks(model: ir.Model, variant: str = "llama") -> None:
    finder = BlockFinder(model.graph, harness.checkpoint(variant).family)
    for index in range(harness.checkpoint(variant).config.num_hidden_layers):
        finder.find(index)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_the_unrolled_trace_is_the_dense_model(variant: str) -> None:
    error = logit_error(harness.model_logits(unrolled(variant)), harness.reference_logits(variant, None))
    assert error <= LIMITS["float32"]


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_the_trace_has_one_node_for_each_attention_norm_and_projection(variant: str) -> None:
    family = harness.checkpoint(variant).family
    operators = harness.operators(harness.traced(variant), "layers.0")
    norms = 1 if family.attention_norm == family.mlp_norm else 2
    head_norms = 2 if variant == "qwen3" else 0
    assert operators.count("Attention") == 1
    assert operators.count("MatMul") == 5 + len(family.mlp_reads)
    assert operators.count("RMSNormalization") + operators.count("LayerNormalization") == norms + head_norms
    assert operators.count("RotaryEmbedding") == (0 if variant == "opt" else 2)
    assert "Transpose" not in operators


def test_unrolled_blocks_have_their_own_weights_names_and_caches() -> None:
    graph = unrolled("llama").graph
    names = [value.name for value in graph.inputs]
    assert names[3:] == [f"past_key_values.{i}.{part}" for i in range(3) for part in ("key", "value")]
    assert len({n.name for n in graph}) == graph.num_nodes()
    weights = [graph.initializers[f"model.layers.{i}.mlp.up_proj.weight"].const_value for i in range(3)]
    assert len({weight.numpy().tobytes() for weight in weights if weight is not None}) == 3


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_every_block_of_every_family_is_recognised(variant: str) -> None:
    find_blocks(unrolled(variant), variant)


def _extra_reader_of_norm(model: ir.Model) -> None:
    norm = node(model, "/model/layers.1/input_layernorm/RMSNormalization")
    model.graph.insert_after(norm, ir.node("Neg", [norm.outputs[0]], name="/model/layers.1/planted/Neg"))


def _extra_reader_of_stream(model: ir.Model) -> None:
    add = node(model, "/model/layers.1/Add")
    model.graph.insert_after(add, ir.node("Neg", [add.outputs[0]], name="/model/layers.1/planted/Neg"))


def _unexplained_add(model: ir.Model) -> None:
    add = node(model, "/model/layers.1/Add")
    query = node(model, "/model/layers.1/self_attn/q_proj/MatMul").outputs[0]
    model.graph.insert_after(add, ir.node("Add", [add.outputs[0], query], name="/model/layers.1/planted_Add"))


def _residual_added_twice(model: ir.Model) -> None:
    add = node(model, "/model/layers.1/Add_1")
    add.replace_input_with(1, add.inputs[0])


def _projection_missing(model: ir.Model) -> None:
    node(model, "/model/layers.1/mlp/up_proj/MatMul").name = "/model/layers.1/mlp/elsewhere/MatMul"


def _projection_twice(model: ir.Model) -> None:
    up = node(model, "/model/layers.1/mlp/up_proj/MatMul")
    model.graph.insert_after(up, ir.node("MatMul", up.inputs, name="/model/layers.1/mlp/up_proj/MatMul"))


def _foreign_weight(model: ir.Model) -> None:
    up = node(model, "/model/layers.1/mlp/up_proj/MatMul")
    up.replace_input_with(1, model.graph.initializers["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (_extra_reader_of_norm, "planted/Neg"),
        (_extra_reader_of_stream, "planted/Neg"),
        (_unexplained_add, "planted_Add"),
        (_residual_added_twice, "model.layers.1"),
        (_projection_missing, "model.layers.1.mlp.up_proj"),
        (_projection_twice, "model.layers.1.mlp.up_proj"),
        (_foreign_weight, "/model/layers.1/mlp/up_proj/MatMul"),
    ],
)
def test_a_block_that_is_not_fully_explained_is_refused_by_name(plant: Any, named: str) -> None:
    model = unrolled("llama")
    find_blocks(model)
    plant(model)
    with pytest.raises(CompileError, match=named):
        find_blocks(model)


def test_blocks_that_are_not_chained_are_refused() -> None:
    config = harness.checkpoint("llama").config
    model = unrolled("llama")
    embedded = node(model, "/model/embed_tokens/Gather").outputs[0]
    for name in ("input_layernorm/RMSNormalization", "Add"):
        node(model, f"/model/layers.2/{name}").replace_input_with(0, embedded)
    with pytest.raises(CompileError, match=r"layers\.2"):
        PruneBlocksPass(config, Masks.dense(config))(model)


def test_full_sets_have_no_gather_and_no_scatter() -> None:
    config = harness.checkpoint("llama").config
    model = harness.rewritten("llama", Masks.dense(config), lowering="canonical", without=FUSIONS)
    operators = harness.operators(model, "layers.")
    assert "Gather" not in operators
    assert "ScatterND" not in operators
    assert operators.count("Add") == 6


@pytest.mark.parametrize("name", ["attention.read", "attention.write", "mlp.read", "mlp.mid", "mlp.write"])
@pytest.mark.parametrize("variant", ["llama", "phi", "opt"])
def test_an_empty_set_removes_its_sub_layer_and_nothing_else(variant: str, name: str) -> None:
    config = harness.checkpoint(variant).config
    masks = Masks.from_indices([{}, {name: []}, {}], config)
    model = harness.rewritten(variant, masks, without=FUSIONS)
    part = {"attention": "self_attn", "mlp": "mlp"}[name.partition(".")[0]]
    kept = harness.operators(model, "layers.1/")
    assert not any(f"layers.1/{part}/" in (n.name or "") for n in model.graph)
    assert kept.count("MatMul") == (2 + (variant == "llama") if part == "self_attn" else 4)
    assert logit_error(harness.model_logits(model), harness.reference_logits(variant, masks)) <= LIMITS["float32"]


def test_pruning_twice_is_refused_rather_than_done_wrongly() -> None:
    config = harness.checkpoint("llama").config
    masks = Masks.random(config, 0.5, 1)
    model = unrolled("llama")
    PruneBlocksPass(config, masks)(model)
    with pytest.raises(CompileError):
        PruneBlocksPass(config, masks)(model)


def test_a_pass_that_misses_a_rewrite_fails() -> None:
    class Lazy(RewritePass):
        name = "lazy"

        def expected(self, model: ir.Model) -> int:
            return 2

        def rewrite(self, model: ir.Model) -> int:
            return 1

    with pytest.raises(CompileError, match="pass lazy made 1 rewrites where 2 were expected"):
        Lazy()(harness.traced("llama"))


@given(st.integers(1, 64), st.data())
def test_gathering_by_the_inverse_index_scatters(width: int, data: st.DataObject) -> None:
    write = np.array(sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=1))))
    values = np.arange(1.0, len(write) + 1)
    scattered = np.zeros(width)
    scattered[write] = values
    np.testing.assert_array_equal(np.append(values, 0.0)[inverse_index(write, width)], scattered)


def test_the_lowered_graph_has_one_gather_and_no_transpose_per_write() -> None:
    masks = Masks.random(harness.checkpoint("llama").config, 0.5, 1)
    operators = harness.operators(harness.rewritten("llama", masks, lowering="inverse-gather"), "layers.1/")
    assert operators.count("Gather") == 4
    assert "Transpose" not in operators
    assert operators.count("GroupQueryAttention") == 1


def test_head_sizes_that_the_kernel_does_not_take_are_refused_with_a_remedy() -> None:
    config = harness.checkpoint("llama").config
    with pytest.raises(CompileError, match=r"multiple of 8.*--target onnx"):
        LowerAttentionPass("right", replace(config, head_dim=12), Masks.dense(config))(harness.traced("llama"))


def test_the_mask_is_gone_where_the_operator_masks_by_itself() -> None:
    masks = Masks.dense(harness.checkpoint("mistral-window").config)
    assert not harness.operators(harness.rewritten("mistral-window", masks), "/mask")
    assert harness.operators(harness.rewritten("mistral-window", masks, padding="left"), "/mask")


@pytest.mark.parametrize("variant", ["llama", "phi", "opt", "qwen2-mixed-window"])
@pytest.mark.parametrize(
    ("target", "lowering"), [("onnx-cpu", "inverse-gather"), ("onnx-cpu", "canonical"), ("onnx", "inverse-gather")]
)
def test_verify_each_is_quiet_over_the_whole_pipeline(variant: str, target: str, lowering: str) -> None:
    checkpoint = harness.checkpoint(variant)
    masks = Masks.random(checkpoint.config, 0.5, 2, norm_scope="selected")
    passes = build_pipeline(make_plan(target, Choices(lowering=lowering)), checkpoint, masks)
    run_pipeline(harness.traced(variant), passes, make_verifier(checkpoint, masks))
    assert pipeline_line(passes).startswith("unroll prune-blocks")
    assert ("inverse-gather" in pipeline_line(passes)) == (lowering != "canonical")


def test_the_line_of_a_pipeline_tells_two_with_other_options_apart() -> None:
    checkpoint = harness.checkpoint("llama")
    masks = Masks.random(checkpoint.config, 0.5, 2)
    quantisation = Quantisation(bits=4, block_size=32, symmetric=True, head=False, embedding=False)
    choices = [Choices(align=8), Choices(align=16), Choices(padding="left"), Choices(quantisation=quantisation)]
    lines = [pipeline_line(build_pipeline(make_plan("onnx-cpu", c), checkpoint, masks)) for c in choices]
    assert "align-widths{multiple=8}" in lines[0] and "align-widths{multiple=16}" in lines[1]
    assert "lower-attention{padding=right}" in lines[0] and "lower-attention{padding=left}" in lines[2]
    assert "quantise{bits=4 block_size=32 symmetric=true" in lines[3]


def test_verifying_does_not_keep_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor wait for a collection, which the command line has switched off."""
    held = []
    load = verify.load_reference
    monkeypatch.setattr(verify, "load_reference", lambda *args: held.append(load(*args)) or held[-1])
    checkpoint = harness.checkpoint("llama")
    make_verifier(checkpoint, Masks.random(checkpoint.config, 0.5, 2))
    assert sum(parameter.numel() for parameter in held[0].parameters()) == 0


@pytest.mark.parametrize("guilty", ["unroll", "prune-blocks", "inverse-gather", "lower-attention"])
def test_verify_each_names_the_pass_that_changed_the_result(guilty: str) -> None:
    checkpoint = harness.checkpoint("llama")
    masks = Masks.random(checkpoint.config, 0.5, 2)
    passes = build_pipeline(make_plan("onnx-cpu", Choices(lowering="inverse-gather")), checkpoint, masks)
    for item in passes:
        if item.name == guilty:
            honest = item.rewrite

            def faulty(model: ir.Model, honest: Any = honest) -> int:
                count: int = honest(model)
                act = next(n for n in model.graph if n.op_type == "Sigmoid")
                for reader in consumers(act.outputs[0]):
                    reader.replace_input_with(1, reader.inputs[0])  # x * sigmoid(x) becomes x * x
                return count

            item.rewrite = faulty  # type: ignore[method-assign]
    with pytest.raises(CompileError, match=f"{guilty} changed the result"):
        run_pipeline(harness.traced("llama"), passes, make_verifier(checkpoint, masks))
