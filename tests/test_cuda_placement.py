"""Where an `onnx-cuda` artifact runs: every node on the CUDA provider, but for the shape arithmetic listed here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import onnx_ir as ir
import pytest
import tiny
import torch
from placement import CPU, CUDA, Placement, place
from test_tune import masks_of

from dispc.export.trace import trace
from dispc.masks import Masks
from dispc.passes.pipeline import build_pipeline, run_pipeline
from dispc.quantisation import Quantisation
from dispc.targets import Choices, make_plan
from dispc.validate.placement import check_placement

SHAPE_NODES = ("/lengths/Cast_total", "Squeeze_total", "Squeeze_new", "/Sub")
"""total_sequence_length, which GroupQueryAttention wants on the CPU, and the bounds of the mask's ranges."""


def placed(variant: str, stub: Path, tmp_path: Path, masks: Masks | None = None, **options: Any) -> Placement:
    checkpoint = harness.checkpoint(variant)
    masks = masks or Masks.random(checkpoint.config, 0.5, 1)
    plan = make_plan("onnx-cuda", Choices(**options))
    model = trace(checkpoint, getattr(torch, plan.dtype))
    run_pipeline(model, build_pipeline(plan, checkpoint, masks))
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    return place(tmp_path / "model.onnx", stub)


def assert_on_cuda(placement: Placement) -> None:
    elsewhere = [name for name, (_, provider) in placement.assigned.items() if provider != CUDA]
    assert all(name.endswith(SHAPE_NODES) and "layers." not in name for name in elsewhere), elsewhere
    check = check_placement(placement)
    assert check.passed, check.detail


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_every_family_runs_on_cuda(variant: str, padding: str, cuda_stub: Path, tmp_path: Path) -> None:
    assert_on_cuda(placed(variant, cuda_stub, tmp_path, padding=padding))


@pytest.mark.parametrize("variant", ["llama", "phi", "opt"])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float32"},
        {"lowering": "canonical"},
        {"dtype": "float32", "lowering": "canonical"},
        {"lowering": "scatter-elements"},
        {"dtype": "bfloat16", "last_logits": True},
    ],
)
def test_every_dtype_and_lowering_runs_on_cuda(
    variant: str, options: dict[str, Any], cuda_stub: Path, tmp_path: Path
) -> None:
    assert_on_cuda(placed(variant, cuda_stub, tmp_path, **options))


@pytest.mark.parametrize("variant", ["llama", "phi", "opt"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_zero_filled_sets_need_no_gather_and_run_on_cuda(
    variant: str, dtype: str, cuda_stub: Path, tmp_path: Path
) -> None:
    """What every MLP reads is filled (masks_of); the attentions still gather."""
    placement = placed(variant, cuda_stub, tmp_path, masks_of(variant), dtype=dtype, lowering="zero-filled")
    assert_on_cuda(placement)
    gathers = [name for name, (operator, _) in placement.assigned.items() if operator == "Gather" and "layers." in name]
    assert [name for name in gathers if "self_attn/read" in name]
    assert not [name for name in gathers if "mlp/read" in name]


@pytest.mark.parametrize("variant", ["llama-tied-biased", "opt"])
@pytest.mark.parametrize(
    ("dtype", "bits", "symmetric"), [("float16", 4, True), ("bfloat16", 8, False), ("float32", 4, False)]
)
def test_quantised_weights_run_on_cuda(
    variant: str, dtype: str, bits: int, symmetric: bool, cuda_stub: Path, tmp_path: Path
) -> None:
    quantisation = Quantisation(bits=bits, block_size=32, symmetric=symmetric, head=True, embedding=True)
    placement = placed(variant, cuda_stub, tmp_path, dtype=dtype, quantisation=quantisation)
    assert_on_cuda(placement)
    operators = [operator for operator, _ in placement.assigned.values()]
    assert operators.count("MatMulNBits") > 3
    assert operators.count("GatherBlockQuantized") == 1
    assert "MatMul" not in operators


def test_a_node_that_falls_back_and_a_copy_are_named(cuda_stub: Path, tmp_path: Path) -> None:
    placement = placed("llama", cuda_stub, tmp_path)
    fallen, copied = "/model/layers.1/mlp/down_proj/MatMul", "Memcpy_token_7"
    broken = replace(
        placement,
        assigned=placement.assigned | {fallen: ("MatMul", CPU)},
        optimised=placement.optimised | {copied: "MemcpyToHost"},
    )
    check = check_placement(broken)
    assert (check.status, check.figure) == ("failed", 2.0)
    assert fallen in check.detail and copied in check.detail
    assert broken.nodes[CPU] == placement.nodes.get(CPU, 0) + 1
    assert json.loads(json.dumps(broken.as_dict()))["unexpected"] == [fallen]


def test_a_llama_block_has_the_operators_it_needs_and_no_more(cuda_stub: Path, tmp_path: Path) -> None:
    placement = placed("llama", cuda_stub, tmp_path)
    block = [op_type for name, op_type in placement.optimised.items() if "layers.1/" in name]
    assert block.count("GroupQueryAttention") == 1
    assert block.count("MatMul") == 4
    assert block.count("SkipSimplifiedLayerNormalization") == 2
    assert block.count("Gather") == 4
    assert "Transpose" not in block
    assert "ScatterND" not in block
