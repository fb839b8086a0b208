"""When a pass must not fire, and that one which finds less than the masks and the config promise is an error."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import command
import harness
import numpy as np
import onnx_ir as ir
import pytest
from harness import TOLERANCE, node
from sets import half, masks_of, targets_of

from dispc.lowerings import LOWERINGS
from dispc.masks import Masks
from dispc.passes.base import RewritePass
from dispc.passes.fuse.fuse_activations import FuseActivationsPass
from dispc.passes.fuse.fuse_qkv import FuseQkvPass
from dispc.passes.fuse.fuse_skip_norm import FuseSkipNormPass
from dispc.passes.pipeline import build_pipeline, run_pipeline
from dispc.plan import Choices, make_plan
from dispc.quantisation import Quantisation
from dispc.runtime.session import Runner, open_session
from dispc.support.errors import CompileError
from dispc.support.graph import add_initializer, make_node
from dispc.targets import FUSIONS, TARGETS
from dispc.validate.checks.parity import logit_error

MLP = "/model/layers.1/mlp"
INT4 = Quantisation(bits=4, block_size=16, symmetric=True, head=False, embedding=False)
KERNEL = "/model/layers.1/self_attn/GroupQueryAttention"


def before(
    name: str, variant: str = "llama", masks: Masks | None = None, target: str = "onnx-cuda", **choices: object
) -> tuple[ir.Model, RewritePass]:
    """The graph before the pass called `name`, and the pass."""
    masks = masks or half(variant)
    passes = build_pipeline(make_plan(target, Choices(**choices)), harness.checkpoint(variant), masks)  # type: ignore[arg-type]
    place = [item.name for item in passes].index(name)
    model = harness.traced(variant)
    run_pipeline(model, passes[:place])
    return model, passes[place]


def rename(name: str) -> Callable[[ir.Model], None]:
    def plant(model: ir.Model) -> None:
        node(model, name).name = f"{MLP}/elsewhere"

    return plant


def another_down(model: ir.Model) -> None:
    """The weight of a block's down projection goes by another name."""
    value = model.graph.initializers.pop("model.layers.1.mlp.down_proj.weight")
    value.name = "model.layers.1.mlp.elsewhere.weight"
    model.graph.register_initializer(value)


def lose_a_write(model: ir.Model) -> None:
    """A write goes by another operator."""
    node(model, f"{MLP}/write/ScatterND").op_type = "ScatterElements"


def another_operator(name: str) -> Callable[[ir.Model], None]:
    """A node of a domain that no pass knows takes the place of one."""

    def plant(model: ir.Model) -> None:
        found = node(model, name)
        found.domain, found.op_type = "elsewhere", f"{found.op_type}Like"

    return plant


def another_head(model: ir.Model) -> None:
    """The weight of the LM head goes by another name."""
    value = model.graph.initializers.pop("lm_head.weight")
    value.name = "lm_head.elsewhere"
    model.graph.register_initializer(value)


def apart(name: str, position: int) -> Callable[[ir.Model], None]:
    """Something stands between a node and one of its inputs."""

    def plant(model: ir.Model) -> None:
        found = node(model, name)
        made = make_node("Identity", [found.inputs[position]], f"{MLP}/Identity")
        model.graph.insert_before(found, made)
        found.replace_input_with(position, made.outputs[0])

    return plant


def between(model: ir.Model) -> None:
    """Something stands between a rotation and its attention."""
    kernel = node(model, "/model/layers.1/self_attn/GroupQueryAttention")
    made = make_node("Identity", [kernel.inputs[0]], "/model/layers.1/self_attn/Identity")
    model.graph.insert_before(kernel, made)
    kernel.replace_input_with(0, made.outputs[0])


MISSED: list[tuple[str, dict[str, Any], Callable[[ir.Model], object], str]] = [
    ("fuse-gate-up", {}, rename(f"{MLP}/gate_proj/MatMul"), "made 2 rewrites where 3 were"),
    ("align-widths", {"align": 32}, rename(f"{MLP}/read/Gather"), "made 8 rewrites where 9 were"),
    ("align-widths", {"align": 32}, another_down, "made 8 rewrites where 9 were"),
    ("fill-zeros", {"lowering": "zero-filled"}, rename(f"{MLP}/read/Gather"), "made 2 rewrites where 3 were"),
    ("inverse-gather", {}, lose_a_write, "made 5 rewrites where 6 were"),
    ("scatter-elements", {"lowering": "scatter-elements"}, lose_a_write, "made 5 rewrites where 6 were"),
    ("feature-extractor", {"target": "onnx-cpu"}, rename(f"{MLP}/write/Gather"), "made 8 rewrites where 9 were"),
    ("fuse-skip-norm", {}, rename(f"{MLP}/write/Add"), "made 5 rewrites where 6 were"),
    ("fuse-skip-norm", {}, another_operator("/model/norm/RMSNormalization"), "made 5 rewrites where 6 were"),
    ("fuse-qkv", {}, between, "made 2 rewrites where 3 were"),
    ("fuse-qkv", {}, another_operator(KERNEL), "2 attentions where 3 are left"),
    (
        "lower-attention",
        {},
        another_operator("/model/layers.1/self_attn/Attention"),
        "made 2 rewrites where 3 were",
    ),
    ("last-logits", {"last_logits": True}, rename("/lm_head/MatMul"), "expected one LM head, found"),
    ("fuse-rotary", {}, between, "made 2 rewrites where 3 were"),
    ("fuse-rotary", {}, lambda model: model.graph.initializers.pop("cos_cache"), "has no cos_cache"),
    ("fuse-activations", {}, apart(f"{MLP}/act_fn/Mul", 1), "made 2 rewrites where 3 were"),
    ("quantise", {"quantisation": INT4}, apart(f"{MLP}/down_proj/MatMul", 1), "made 11 rewrites where 12 were"),
]
"""Pass, the choices that make it run, a node that is renamed or broken before it, and its error."""
NAMED: list[tuple[str, str, Callable[[ir.Model], object], str]] = [
    ("unroll", "llama", rename("/model/layers.0/mlp/down_proj/MatMul"), "one value must leave the block"),
    (
        "prune-blocks",
        "llama",
        rename(f"{MLP}/down_proj/MatMul"),
        "layers.1.mlp.down_proj: expected one MatMul",
    ),
    ("fold-multipliers", "granite", another_operator("/model/layers.1/Mul"), "fold-multipliers made 6 .* 7 were"),
    ("tie-embeddings", "llama-tied-biased", another_head, "tie-embeddings made 0 rewrites where 1 were"),
]
"""The same for passes whose error names the node, or that other variants have."""
BY_OPERATOR = {"lower-opset"}
"""Passes that look at every operator of a kind, whatever its name: there is nothing to miss."""


def test_every_pass_has_a_node_planted_that_it_misses() -> None:
    quantisation = [None, replace(INT4, head=True)]
    found = {
        item.name
        for target in TARGETS
        for lowering in LOWERINGS
        for quantised in quantisation
        for variant in ("granite", "llama-tied-biased")
        for item in passes_of(target, lowering, quantised, variant)
    }
    assert found == {row[0] for row in (*MISSED, *NAMED)} | BY_OPERATOR


def passes_of(target: str, lowering: str, quantisation: Quantisation | None, variant: str) -> list[RewritePass]:
    """The passes for a choice; none where it cannot be made."""
    try:
        choices = Choices(lowering=lowering, quantisation=quantisation, align=8, last_logits=True)
        return build_pipeline(make_plan(target, choices), harness.checkpoint(variant), half(variant))
    except CompileError:
        return []


@pytest.mark.parametrize(("name", "variant", "plant", "says"), NAMED)
def test_a_pass_that_misses_a_node_says_so(
    name: str, variant: str, plant: Callable[[ir.Model], object], says: str
) -> None:
    model, rewrite = before(name, variant)
    plant(model)
    with pytest.raises(CompileError, match=says):
        rewrite(model)


@pytest.mark.parametrize(("name", "choices", "plant", "says"), MISSED)
def test_a_pass_that_does_not_find_what_the_masks_promise_fails(
    name: str, choices: dict[str, Any], plant: Callable[[ir.Model], None], says: str
) -> None:
    model, rewrite = before(name, masks=masks_of("llama"), **choices)
    plant(model)
    with pytest.raises(CompileError, match=rf"{name}.*{says}"):
        rewrite(model)


@pytest.mark.parametrize(
    ("name", "variant", "choices", "says"),
    [
        ("fuse-qkv", "qwen3", {}, "GroupQueryAttention: Reshape stands after a projection"),
        ("fuse-rotary", "phi", {}, "every attention: head size 16, of which 8 rotate"),
        ("fuse-skip-norm", "llama", {}, "/model/layers.0/input_layernorm/RMSNormalization: reads what /model/embed"),
        ("fill-zeros", "llama", {"lowering": "zero-filled"}, "0.attention.read: "),
    ],
)
def test_what_is_not_rewritten_says_why(name: str, variant: str, choices: dict[str, Any], says: str) -> None:
    model, rewrite = before(name, variant, **choices)
    rewrite(model)
    assert any(says in reason for reason in rewrite.left), rewrite.left


def test_reasons_are_written_beside_the_graphs(tmp_path: Path) -> None:
    half("llama").save(tmp_path / "m.safetensors", harness.checkpoint("llama").config)
    line = ("compile", harness.checkpoint("llama").directory, "--masks", tmp_path / "m.safetensors", "-t", "onnx-cpu")
    line += ("-o", tmp_path / "out", "--dump-ir", tmp_path / "ir", "--no-validate")
    assert command.run(*line).code == 0
    reason = "fuse-skip-norm: /model/layers.0/input_layernorm/RMSNormalization: reads what"
    assert reason in (tmp_path / "ir" / "not-rewritten.txt").read_text()
    outcome = command.run("--debug", *line, "--force")
    assert outcome.code == 0 and f"not rewritten: {reason}" in outcome.err
    assert "not rewritten" not in command.run(*line, "--force").err


@pytest.mark.parametrize("name", ["fuse-gate-up", "fuse-rotary", "fuse-skip-norm", "fuse-qkv", "lower-attention"])
def test_what_is_fused_already_is_missed_too(name: str) -> None:
    model, rewrite = before(name)
    rewrite(model)
    with pytest.raises(CompileError, match=f"{name} made 0 rewrites where [36] were expected"):
        rewrite(model)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("norm_scope", ["full", "selected"])
def test_removed_sub_layers_and_full_sets_are_counted_as_they_are(lowering: str, norm_scope: str) -> None:
    """The counts of the passes hold (a wrong one is an error) for sets of every kind."""
    config = harness.checkpoint("llama").config
    none, full, nearly = [], np.arange(config.hidden_size), np.arange(1, config.hidden_size)
    rows = [
        {"attention.read": none, "mlp.read": full, "mlp.write": nearly, "mlp.mid": np.arange(7)},
        {"attention.write": nearly, "mlp.mid": none},
        {"attention.read": nearly, "attention.write": full, "mlp.read": np.arange(3), "mlp.write": np.arange(5)},
    ]
    masks = Masks.from_indices(rows, config, norm_scope=norm_scope)  # type: ignore[arg-type]
    model = harness.rewritten("llama", masks, target=targets_of(lowering)[0], lowering=lowering, align=16)
    error = logit_error(harness.model_logits(model), harness.reference_logits("llama", masks))
    assert error <= TOLERANCE


def test_a_set_that_alignment_made_large_is_not_filled_with_zeros() -> None:
    """40 of 48 are less than nine tenths, and stay less when they are padded to 48."""
    config = harness.checkpoint("llama").config
    masks = Masks.from_indices([{"mlp.read": np.arange(40)}] * config.num_hidden_layers, config)
    model = harness.rewritten("llama", masks, lowering="zero-filled", align=16)
    assert harness.operators(model, "mlp/read") == ["Gather"] * config.num_hidden_layers


def test_a_bias_that_is_no_initializer_is_not_fused_into_a_gelu() -> None:
    model, rewrite = before("fuse-activations", "phi")
    gelus = [n for n in model.graph if n.op_type == "Gelu"]
    add = gelus[1].inputs[0].producer()  # type: ignore[union-attr]
    assert add is not None and isinstance(rewrite, FuseActivationsPass)
    computed = make_node("Identity", [add.inputs[1]], "/planted/Identity")
    model.graph.insert_before(add, computed)
    add.replace_input_with(1, computed.outputs[0])
    rewrite(model)
    assert rewrite.count == len(gelus) - 1
    assert [n for n in model.graph if n.op_type == "Gelu"] == [gelus[1]]


def test_projections_that_read_different_values_are_not_packed() -> None:
    model, rewrite = before("fuse-qkv")
    key = node(model, "/model/layers.1/self_attn/k_proj/MatMul")
    other = make_node("Identity", [key.inputs[0]], "/planted/Identity")
    model.graph.insert_before(key, other)
    key.replace_input_with(0, other.outputs[0])
    assert isinstance(rewrite, FuseQkvPass)
    with pytest.raises(CompileError, match="self_attn.q_proj.*do not read the same value"):
        rewrite(model)


def test_a_biased_projection_is_not_packed_with_one_that_has_no_bias() -> None:
    model, rewrite = before("fuse-gate-up")
    gate = node(model, f"{MLP}/gate_proj/MatMul")
    width = gate.inputs[1].const_value.shape.numpy()[1]  # type: ignore[union-attr]
    bias = add_initializer(model.graph, "planted.bias", np.ones(width, dtype=np.float32))
    add = make_node("Add", [gate.outputs[0], bias], f"{MLP}/gate_proj/Add")
    model.graph.insert_after(gate, add)
    ir.convenience.replace_all_uses_with(gate.outputs[0], add.outputs[0])
    add.replace_input_with(0, gate.outputs[0])
    with pytest.raises(CompileError, match="only some of the projections"):
        rewrite(model)


def test_a_sum_that_is_a_graph_output_stays_one_and_keeps_its_name_and_value(tmp_path: Path) -> None:
    """A skip-norm may take its add's place only as long as who reads the sum still finds it."""
    found = []
    for fused in (False, True):
        model, rewrite = before("fuse-skip-norm", without=tuple(name for name in FUSIONS if name != "fuse-skip-norm"))
        total = node(model, "/model/layers.1/self_attn/write/Add").outputs[0]
        total.name, total.type = "total", ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(total)
        assert isinstance(rewrite, FuseSkipNormPass)
        if fused:
            rewrite(model)
            assert [value.name for value in model.graph.outputs].count("total") == 1
        path = tmp_path / f"{fused}.onnx"
        ir.save(model, path)
        runner = Runner(open_session(path, optimise=False))
        ones = np.ones((1, len(harness.TOKENS)), dtype=np.int64)
        positions = np.arange(len(harness.TOKENS))[None]
        outputs, _ = runner.run_all(harness.TOKENS[None], ones, positions, runner.empty_caches(1))
        found.append(outputs)
    for name in ("total", "logits"):
        assert logit_error(found[1][name], found[0][name]) <= TOLERANCE
