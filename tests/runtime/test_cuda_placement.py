"""Where an `onnx-cuda` artifact runs: every node on the CUDA provider, but for the shape arithmetic listed here."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import harness
import onnx_ir as ir
import pytest
import tiny
import torch
from placement import CPU, CUDA, Placement, place
from sets import masks_of

from dispc.export.trace import trace
from dispc.lowerings import LOWERINGS
from dispc.masks import Masks
from dispc.passes.pipeline import build_pipeline, run_pipeline
from dispc.plan import Choices, Plan, make_plan
from dispc.quantisation import Quantisation
from dispc.support.errors import CompileError
from dispc.targets import TARGETS
from dispc.validate.checks.placement import check_placement

SHAPE_NODES = ("/lengths/Cast_total", "Squeeze_total", "Squeeze_new", "/Sub")
"""total_sequence_length, which GroupQueryAttention wants on the CPU, and the bounds of the mask's ranges."""


@dataclass(frozen=True)
class Block:
    """What a block of a variant needs: MatMuls with padding on the right, on the left and in float32 (where attention
    is opset 23's), skip-norms of an Add, the Transposes that the canonical form leaves, and those of every form."""

    matmuls: tuple[int, int, int]
    norms: int
    transposes: int
    always: int = 0


USUAL = Block((4, 6, 6), 2, 4)
UNROTATED = Block((4, 4, 6), 2, 4)
APART = Block((6, 6, 6), 2, 4)
"""Between projections and attention are norms of heads, or a rotation of fewer dimensions than the kernels take."""
BLOCKS: dict[str, Block] = {
    "llama": USUAL,
    "llama-tied-biased": USUAL,
    "llama3-rope": USUAL,
    "mistral-window": USUAL,
    "qwen2": USUAL,
    "qwen2-mixed-window": USUAL,
    "qwen3": APART,
    "phi": replace(APART, norms=1, transposes=3),  # one norm for both sub-layers
    "phi-wide-rotary": replace(USUAL, norms=1, transposes=3),
    "opt": UNROTATED,
    "phi-gelu": replace(APART, norms=1, transposes=3),
    "opt-gelu": UNROTATED,
    "granite": USUAL,
    "granite-tied": USUAL,
    "smollm3": UNROTATED,  # block 1 is
    "starcoder2": USUAL,
    "stablelm": APART,
    "nemotron": APART,
    "phi3": APART,
    "gpt-neox": replace(APART, norms=1, transposes=3),  # two norms of one sum
    "gpt-neox-sequential": USUAL,
    "cohere": replace(USUAL, norms=1, transposes=3),
    "gemma": USUAL,
    "olmo2": replace(APART, norms=0),  # none reads a sum
    "gemma2": USUAL,
    "gemma3": replace(APART, always=4),  # around the norms of heads
}
GATHERS = {"inverse-gather": 4, "zero-filled": 3, "canonical": 2, "scatter-elements": 2}
"""Of two reads and two writes; what the MLP reads is nearly everything (masks_of), so that zero-filled fills it."""


def expected_operators(variant: str, plan: Plan) -> dict[str, int]:
    block, name = BLOCKS[variant], plan.lowering.name
    kind = 2 if not plan.group_query else 1 if plan.padding == "left" else 0
    return {
        "GroupQueryAttention": int(plan.group_query),
        "Attention": int(not plan.group_query),
        "MatMul": block.matmuls[kind],
        "skip-norms": block.norms if plan.lowering.adds else 0,
        "Gather": GATHERS[name],
        "Transpose": block.always + (block.transposes if name == "canonical" else 0),
        "ScatterND": 2 * (name == "canonical"),
        "ScatterElements": 2 * (name == "scatter-elements"),
    }


def operators_of_a_block(placement: Placement) -> dict[str, int]:
    """The same, counted in the graph that is run."""
    counts = Counter(op_type for name, op_type in placement.optimised.items() if "layers.1/" in name)
    counts["skip-norms"] = counts["SkipLayerNormalization"] + counts["SkipSimplifiedLayerNormalization"]
    return {name: counts[name] for name in expected_operators("llama", make_plan("onnx-cuda"))}


def plans() -> Iterator[Plan]:
    """Every dtype, padding and lowering that the target can run."""
    for dtype, padding, lowering in product(TARGETS["onnx-cuda"].dtypes, ("right", "left"), LOWERINGS):
        try:
            yield make_plan("onnx-cuda", Choices(dtype=dtype, padding=padding, lowering=lowering))
        except CompileError:
            continue


@cache
def traced(variant: str, dtype: str) -> ir.Model:
    return trace(harness.checkpoint(variant), getattr(torch, dtype))


def write(variant: str, plan: Plan, masks: Masks, path: Path) -> Path:
    """The graph of a plan at `path`, its weights beside it."""
    model = traced(variant, plan.dtype).clone()
    run_pipeline(model, build_pipeline(plan, harness.checkpoint(variant), masks))
    ir.save(model, path, external_data=f"{path.name}.data")
    return path


def placed(variant: str, stub: Path, tmp_path: Path, **options: Any) -> Placement:
    masks = Masks.random(harness.checkpoint(variant).config, 0.5, 1)
    return place([write(variant, make_plan("onnx-cuda", Choices(**options)), masks, tmp_path / "model.onnx")], stub)[0]


def assert_on_cuda(placement: Placement) -> None:
    elsewhere = [name for name, (_, provider) in placement.assigned.items() if provider != CUDA.name]
    assert all(name.endswith(SHAPE_NODES) and "layers." not in name for name in elsewhere), elsewhere
    check = check_placement(placement)
    assert check.passed, check.detail


def test_the_matrix_has_every_family_and_lowering_and_what_is_left_out_cannot_run() -> None:
    assert {*tiny.VARIANTS, *tiny.FURTHER} <= {*BLOCKS}
    found = Counter((plan.dtype, plan.padding) for plan in plans())
    assert found == {
        ("float16", "right"): 4,
        ("float16", "left"): 4,
        ("float32", "left"): 4,
        ("bfloat16", "right"): 2,
        ("bfloat16", "left"): 2,  # no ScatterND(add), no ScatterElements(add)
    }


@pytest.mark.parametrize("variant", BLOCKS)
def test_every_dtype_padding_and_lowering_runs_on_cuda_with_the_operators_it_needs(
    variant: str, cuda_stub: Path, tmp_path: Path
) -> None:
    every, masks = list(plans()), masks_of(variant)
    models = [write(variant, plan, masks, tmp_path / f"{number}.onnx") for number, plan in enumerate(every)]
    for plan, placement in zip(every, place(models, cuda_stub), strict=True):
        what = f"{plan.dtype}, {plan.padding}, {plan.lowering.name}"
        assert_on_cuda(placement)
        assert operators_of_a_block(placement) == expected_operators(variant, plan), what


@pytest.mark.parametrize("variant", ["llama", "phi", "opt"])
def test_logits_of_the_last_token_are_taken_on_cuda(variant: str, cuda_stub: Path, tmp_path: Path) -> None:
    assert_on_cuda(placed(variant, cuda_stub, tmp_path, dtype="bfloat16", last_logits=True))


@pytest.mark.parametrize("variant", ["llama-tied-biased", "opt", "nemotron", "olmo2", "gemma3"])
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
    outside = [operator for name, operator in placement.optimised.items() if "layers." not in name]
    assert "Reshape" not in outside  # of a tied embedding: it is folded on CUDA too


def test_a_node_that_falls_back_and_a_copy_are_named(cuda_stub: Path, tmp_path: Path) -> None:
    placement = placed("llama", cuda_stub, tmp_path)
    fallen, copied = "/model/layers.1/mlp/down_proj/MatMul", "Memcpy_token_7"
    broken = replace(
        placement,
        assigned=placement.assigned | {fallen: ("MatMul", CPU.name)},
        optimised=placement.optimised | {copied: "MemcpyToHost"},
    )
    check = check_placement(broken)
    assert (check.status, check.figure) == ("failed", 2.0)
    assert fallen in check.detail and copied in check.detail
    assert broken.nodes[CPU.name] == placement.nodes.get(CPU.name, 0) + 1
    assert json.loads(json.dumps(broken.as_dict()))["unexpected"] == [fallen]
