"""The judge itself: good artifacts pass in every scenario, planted faults are found and named, thresholds decide."""

import functools
from pathlib import Path
from typing import Any

import faults
import harness
import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from artifacts import artifact, compiled, failed, judged
from hypothesis import given
from hypothesis import strategies as st
from sets import half

from dispc.masks import Masks
from dispc.reference.blocks import Blocks
from dispc.reference.masked import load_reference
from dispc.reference.truth import TOLERANCE, Answers, Text, ask, divergence, truth_dtype
from dispc.runtime.session import Artifact, refuse_left_padding
from dispc.support.errors import ArtifactError
from dispc.validate import CheckOptions, Report, Thresholds, check
from dispc.validate.checks.parity import LIMITS, logit_error
from dispc.validate.checks.scenarios import SCENARIOS
from dispc.validate.client import Client

NOT_HERE = {"CUDA graph replay", "positions near the limit"}


@functools.cache
def good(padding: str) -> Report:
    return judged(artifact(padding=padding))


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_good_artifact_passes_every_scenario_that_applies(padding: str) -> None:
    report = good(padding)
    assert report.passed, failed(report)
    names = {check.name: check for check in report.checks}
    assert {scenario.name for scenario in SCENARIOS} <= set(names)
    skipped = {name for name, check in names.items() if check.status == "skipped"}
    assert skipped == (NOT_HERE if padding == "right" else NOT_HERE | {"shared past and present"})
    assert all(names[name].detail for name in skipped)
    assert "64 steps" in names["greedy tokens"].detail
    assert int(names["decode"].detail.split()[0]) >= 64


def test_padding_of_the_other_side_is_wrong_where_documented_and_right_where_the_mask_rules() -> None:
    right, left = ({check.name: check for check in good(side).checks} for side in ("right", "left"))
    noted, judged = right["padding of the other side"], left["padding of the other side"]
    assert (noted.status, judged.status) == ("noted", "passed")
    assert noted.figure is not None and noted.figure > 1e4


def test_where_dispc_feeds_an_artifact_padding_of_the_other_side_is_an_error() -> None:
    client = Client(Artifact(artifact(padding="right")), 131)
    with pytest.raises(ArtifactError, match=r"row 1 .*--padding left"):
        client.batch([client.tokens(0, 4), client.tokens(1, 3)], padding="left").prefill([4, 3])
    refuse_left_padding(np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]]))


@pytest.mark.parametrize(
    ("variant", "target", "options"),
    [
        ("llama", "onnx-cpu", {"norm_scope": "selected"}),
        ("mistral-window", "onnx-cpu", {"lowering": "canonical"}),
        ("qwen3", "onnx", {"dtype": "float16"}),
        ("opt", "onnx-cuda", {"dtype": "bfloat16"}),
        ("llama", "onnx-cuda", {"dtype": "float16", "padding": "left"}),
    ],
)
def test_every_kind_of_artifact_passes_and_its_streams_are_found(
    variant: str, target: str, options: dict[str, Any]
) -> None:
    path = artifact(variant, target, **options)
    report = judged(path, variant, device="cpu", drill=True)
    assert report.passed, failed(report)
    assert report.drill is not None and report.drill.verdict is None
    stages = report.drill.stages
    assert [stage.name for stage in stages[1:3]] == ["block 0 attention", "block 0 mlp"]
    assert len(stages) == 2 * 3 + 2
    assert all(stage.ratio <= 4 for stage in stages)
    assert ("instead of CUDAExecutionProvider (chosen)" in report.headline) == (target == "onnx-cuda")
    half_for_cuda = target == "onnx-cuda" and report.dtype != "float32"
    assert ("widened" in report.judged_on) == (half_for_cuda or report.dtype == "bfloat16")


def test_a_sliding_window_in_front_of_padding_is_documented(tmp_path: Path) -> None:
    """Padding on the right of a left-padded artifact stands between a token and its past, and takes up the window."""
    report = judged(artifact("mistral-window", padding="left"), "mistral-window")
    assert report.passed
    noted = next(check for check in report.checks if check.name == "padding of the other side")
    assert noted.status == "noted" and "sliding window" in noted.detail
    assert noted.figure is not None and noted.figure > 4


def test_rotary_tables_are_compared_where_the_end_of_the_context_is_out_of_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dispc.validate.checks.scenarios.REACH", 8)
    checks = {check.name: check for check in judged(artifact("llama", padding="right"), "llama").checks}
    assert checks["positions near the limit"].status == "skipped"
    assert "rotary tables" in checks["positions near the limit"].detail
    assert (checks["rotary tables"].status, checks["rotary tables"].figure) == ("passed", 0.0)


@pytest.mark.parametrize("name", ["error", "kl"])
def test_a_threshold_below_the_figure_fails(name: str) -> None:
    checks = {check.name: check for check in good("right").checks}
    figure = checks["prefill" if name == "error" else "KL divergence"].figure
    assert figure is not None
    assert not judged(artifact(padding="right"), thresholds=Thresholds(**{name: 0.9 * figure}), quick=True).passed


def test_a_model_that_onnx_runtime_cannot_run_has_failed(tmp_path: Path) -> None:
    def misread(model: Any) -> None:
        values = faults.initializer(model, "model.layers.1.mlp.read")
        faults.replace(model, "model.layers.1.mlp.read", values + 1000)

    broken = faults.plant(misread, artifact(padding="right"), tmp_path / "broken")
    quick = judged(broken, quick=True)
    assert failed(quick) == {scenario.name for scenario in SCENARIOS if scenario.quick}
    assert all("cannot run" in check.detail for check in quick.checks if not check.passed)
    assert quick.drill is not None and "/model/layers.1/mlp/read/Gather" in (quick.drill.verdict or "")
    report = judged(broken)
    assert failed(report) >= {scenario.name for scenario in SCENARIOS} - NOT_HERE
    assert "same bits" in failed(report)


def test_a_graph_whose_stream_cannot_be_followed_is_still_judged(tmp_path: Path) -> None:
    def reroute(model: Any) -> None:
        """An Add of nothing into the stream: right, and a sub-layer too many."""
        first = next(node for node in model.graph if node.name == "/model/layers.1/input_layernorm/LayerNormalization")
        stream = first.inputs[0]
        twin = ir.node("Sub", [stream, stream], name="nothing")
        added = ir.node("Add", [stream, twin.outputs[0]], name="more")
        model.graph.insert_before(first, [twin, added])
        first.replace_input_with(0, added.outputs[0])
        for use in [use for use in stream.uses() if use.node not in (twin, added, first)]:
            use.node.replace_input_with(use.idx, added.outputs[0])

    report = judged(
        faults.plant(reroute, artifact(padding="right", without=("fuse-skip-norm",)), tmp_path / "broken"), drill=True
    )
    assert failed(report) == {"graph"}
    assert report.drill is not None and "no drill:" in report.drill.verdict


def fuse_adds_into_norms(model: ir.Model) -> None:
    """Every residual Add and the norm after it as one node, as ONNX Runtime spells it."""
    for add in [node for node in model.graph if (node.name or "").endswith("/write/Add")]:
        stream, update = add.inputs
        (norm,) = [use.node for use in add.outputs[0].uses() if use.node.op_type == "SimplifiedLayerNormalization"]
        last = len(add.outputs[0].uses()) == 1  # nothing else reads the sum: the fourth output is left out
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [update, stream, norm.inputs[1]],
            domain="com.microsoft",
            attributes={"epsilon": norm.attributes["epsilon"].as_float()},
            num_outputs=1 if last else 4,
            name=norm.name,
        )
        for number, value in enumerate(fused.outputs):
            value.name = f"{norm.name}_fused_{number}" if number in (0, 3) else ""
        model.graph.insert_before(norm, fused)
        ir.convenience.replace_all_uses_with(norm.outputs[0], fused.outputs[0])
        if not last:
            ir.convenience.replace_all_uses_with(add.outputs[0], fused.outputs[3])
        model.graph.remove([norm, add], safe=True)


def test_streams_are_found_where_adds_are_fused_into_norms(tmp_path: Path) -> None:
    path = faults.plant(fuse_adds_into_norms, artifact("llama"), tmp_path / "fused")
    report = judged(path, "llama", drill=True)
    assert report.passed and report.drill is not None
    assert [stage.name for stage in report.drill.stages] == [
        "embedding",
        *(f"block {block} {part}" for block in range(3) for part in ("attention", "mlp")),
        "final norm and head",
    ]
    assert all(0 < stage.ratio <= 4 for stage in report.drill.stages[1:])


# The truth, and what is made of it


def read(variant: str, masks: Masks, dtype: str, texts: list[Text], **options: Any) -> Answers:
    blocks = Blocks(load_reference(harness.checkpoint(variant), masks), harness.checkpoint(variant).config)
    return ask(blocks, texts, torch.float64, dtype, **options)


def own_errors(answers: Answers, text: Text) -> harness.Array:
    """Largest error of any draw at each position [S]."""
    (piece,) = answers.pieces(text, "logits", np.arange(len(text.tokens)))
    return np.max([np.abs(own - piece.truth).max(axis=-1) for own in piece.own], axis=0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("variant", tiny.VARIANTS | tiny.FURTHER)
def test_reading_block_by_block_is_reading_the_whole_model_in_float64(variant: str) -> None:
    checkpoint = harness.checkpoint(variant)
    masks = Masks.random(checkpoint.config, 0.5, 1, norm_scope="selected")
    text = Text(tuple(harness.TOKENS.tolist()))

    def logits(dtype: torch.dtype) -> harness.Array:
        model = load_reference(checkpoint, masks, dtype)
        with torch.inference_mode():
            for name, buffer in model.named_buffers():
                if name.endswith("embed_scale"):  # of Gemma, read as float32; a model in float64 computes it anew
                    buffer.copy_(buffer.float())
            return model(input_ids=torch.from_numpy(text.array)[None]).logits[0].numpy()  # type: ignore[no-any-return]

    answers = read(variant, masks, "float32", [text], streams=True)
    (piece,) = answers.pieces(text, "logits", np.arange(len(text.tokens)))
    assert piece.truth.dtype == np.float64
    assert np.abs(piece.truth - logits(torch.float64)).max() < 1e-12
    own = own_errors(answers, text)
    assert (np.abs(piece.truth - logits(torch.float32)).max(axis=-1) <= 1.001 * own).all()  # the first draw is torch's
    assert 1e-8 < own.max() < 1e-4


def test_a_text_that_begins_another_is_not_read_twice() -> None:
    masks, tokens = half("llama"), tuple(harness.TOKENS.tolist())
    whole, beginning, elsewhere = Text(tokens), Text(tokens[:5]), Text(tokens[:5], offset=3)
    answers = read("llama", masks, "float32", [beginning, whole, elsewhere])
    assert set(answers.readings) == {whole, elsewhere}
    assert answers.source(beginning) == whole and answers.source(elsewhere) == elsewhere


def test_logits_in_pieces_are_those_of_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, text = (
        read("llama", half("llama"), "float32", [text := Text(tuple(harness.TOKENS.tolist()))]),
        text,
    )
    at = np.arange(len(text.tokens))
    (whole,) = answers.pieces(text, "logits", at)
    monkeypatch.setattr("dispc.reference.truth.PIECE_BYTES", 8 * 131 * 2)
    pieces = [*answers.pieces(text, "logits", at[3:])]
    assert len(pieces) == 5 and np.array_equal(np.concatenate([piece.at for piece in pieces]), at[3:])
    assert np.abs(np.concatenate([piece.truth for piece in pieces]) - whole.truth[3:]).max() < 1e-12


def test_the_own_error_of_halves_is_that_of_their_precision() -> None:
    masks, text = half("llama"), Text(tuple(harness.TOKENS.tolist()))
    own = {
        dtype: own_errors(read("llama", masks, dtype, [text]), text).mean()
        for dtype in ("float32", "float16", "bfloat16")
    }
    assert 1000 < own["float16"] / own["float32"] < 30000  # 13 bits
    assert 2 < own["bfloat16"] / own["float16"] < 32  # 3 bits


def test_a_truth_no_finer_than_the_artifact_is_judged_by_a_tolerance() -> None:
    report = judged(artifact(padding="right"), reference_dtype="float32", quick=True)
    assert report.passed
    assert report.truth == "reference in float32"
    prefill = next(check for check in report.checks if check.name == "prefill")
    spread = prefill.figures["error"] / prefill.figures["error_of_range"]
    assert prefill.figures["own_error"] == pytest.approx(TOLERANCE["float32"] * spread, rel=0.1)
    assert all(4 * TOLERANCE[dtype] == limit for dtype, limit in LIMITS.items())
    assert truth_dtype(None) == truth_dtype("float64") == torch.float64
    with pytest.raises(ArtifactError, match="float64 or float32"):
        truth_dtype("float8")


def test_nan_is_an_infinite_error() -> None:
    expected = np.array([0.0, 1.0])
    assert logit_error(np.array([0.0, np.nan]), expected) == float("inf")
    assert logit_error(np.array([0.0, np.inf]), expected) == float("inf")
    assert logit_error(np.array([0.5, 1.0]), expected) == 0.5
    assert logit_error(np.array([-0.5, 1.0]), expected) == 0.5


def test_an_artifact_that_says_nan_fails_with_these_words(tmp_path: Path) -> None:
    def poison(model: Any) -> None:
        values = faults.initializer(model, "lm_head.weight")
        values[0, 0] = np.nan
        faults.replace(model, "lm_head.weight", values)

    report = judged(faults.plant(poison, artifact(padding="right"), tmp_path / "broken"), quick=True)
    assert {"prefill", "decode", "padded batch", "KL divergence"} <= failed(report)
    assert "NaN or infinity" in next(check for check in report.checks if check.name == "prefill").detail


@pytest.mark.parametrize("known", [True, False])
def test_what_activations_cost_is_part_of_the_own_error(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm after one middle position magnifies what GELU leaves of a large negative number: kernels differ there."""
    if not known:
        monkeypatch.setattr("dispc.reference.truth._is_activation", lambda *_: False)
    checkpoint = harness.checkpoint("gemma3")
    drawn = Masks.random(checkpoint.config, 0.5, 7).blocks
    blocks = [dict(block.sets()) | {"mlp.mid": np.array([7])} for block in drawn]
    compiled(checkpoint, Masks.from_indices(blocks, checkpoint.config), tmp_path)
    assert check(tmp_path / "out", checkpoint.directory, CheckOptions(device="cpu", quick=True)).passed == known


LOGITS = st.floats(-30, 30)


@given(st.lists(LOGITS, min_size=2, max_size=6), st.lists(LOGITS, min_size=6, max_size=6), st.floats(-9, 9))
def test_divergence_is_zero_for_equal_distributions_and_positive_otherwise(
    first: list[float], second: list[float], shift: float
) -> None:
    p, q = np.array([first]), np.array([second[: len(first)]])
    assert divergence(p, p + shift)[0] == pytest.approx(0, abs=1e-9)
    assert divergence(p, q)[0] >= 0
    expected = torch.nn.functional.kl_div(
        torch.from_numpy(q).log_softmax(-1), torch.from_numpy(p).log_softmax(-1), log_target=True, reduction="sum"
    )
    assert divergence(p, q)[0] == pytest.approx(max(float(expected), 0), abs=1e-9, rel=1e-9)
