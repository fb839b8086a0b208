"""Each fusion does what its docstring shows, and leaves alone what it cannot do."""

from pathlib import Path

import harness
import numpy as np
import onnx_ir as ir
import pytest
from harness import TOLERANCE
from sets import half

from dispc.runtime.session import Runner, open_session
from dispc.validate.checks.parity import logit_error
from dispc.validate.client import Batch


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
