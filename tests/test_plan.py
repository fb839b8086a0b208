"""The table of targets: what each row gives by default, what it refuses, and what runtimes are told of it."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import command
import harness
import pytest
import tiny

from dispc.export.companions import genai_config
from dispc.model.checkpoint import Checkpoint
from dispc.plan import Choices, make_plan
from dispc.quantisation import Quantisation
from dispc.runtime.providers import PROVIDERS
from dispc.support.errors import CompileError
from dispc.targets import TARGETS

INT4 = Quantisation(bits=4, block_size=32, symmetric=True, head=False, embedding=False)
CUDA_GRAPH, NO_CUDA_GRAPH = [{"cuda": {"enable_cuda_graph": "1"}}], [{"cuda": {}}]
NO_TF32 = [{"cuda": {"use_tf32": "0"}}]
RUNTIME: dict[tuple[str, str, str, bool], tuple[bool, list[Any]]] = {
    ("onnx-cuda", "float16", "right", True): (True, CUDA_GRAPH),
    ("onnx-cuda", "float16", "right", False): (True, NO_CUDA_GRAPH),
    ("onnx-cuda", "float16", "left", True): (False, NO_CUDA_GRAPH),
    ("onnx-cuda", "float16", "left", False): (False, NO_CUDA_GRAPH),
    ("onnx-cuda", "bfloat16", "right", True): (True, CUDA_GRAPH),
    ("onnx-cuda", "bfloat16", "right", False): (True, NO_CUDA_GRAPH),
    ("onnx-cuda", "bfloat16", "left", True): (False, NO_CUDA_GRAPH),
    ("onnx-cuda", "bfloat16", "left", False): (False, NO_CUDA_GRAPH),
    ("onnx-cuda", "float32", "left", True): (False, NO_TF32),
    ("onnx-cuda", "float32", "left", False): (False, NO_TF32),
    ("onnx-cpu", "float32", "right", True): (True, []),
    ("onnx-cpu", "float32", "right", False): (True, []),
    ("onnx-cpu", "float32", "left", True): (False, []),
    ("onnx-cpu", "float32", "left", False): (False, []),
    ("onnx", "float32", "left", True): (False, []),
    ("onnx", "float32", "left", False): (False, []),
    ("onnx", "float16", "left", True): (False, []),
    ("onnx", "float16", "left", False): (False, []),
    ("onnx", "bfloat16", "left", True): (False, []),
    ("onnx", "bfloat16", "left", False): (False, []),
}
"""By target, dtype, padding and whether CUDA graphs are allowed: past_present_share_buffer, and provider_options."""


def test_runtimes_share_buffers_and_capture_graphs_where_the_graph_allows_it_and_nowhere_else() -> None:
    checkpoint, found = harness.checkpoint("llama"), {}
    for target, padding, allowed in product(TARGETS.values(), ("right", "left"), (True, False)):
        for dtype in target.dtypes:
            try:
                plan = make_plan(target.name, Choices(dtype=dtype, padding=padding, cuda_graph=allowed))
            except CompileError:
                continue
            provider = PROVIDERS[plan.target.provider]
            told = provider.genai_options(graph=plan.cuda_graph, dtype=plan.dtype)
            config = genai_config(checkpoint, plan, 3, [], told)
            provider_options = config["model"]["decoder"]["session_options"]["provider_options"]
            found[target.name, dtype, padding, allowed] = (
                config["search"]["past_present_share_buffer"],
                provider_options,
            )
            assert plan.cuda_graph == (provider_options == CUDA_GRAPH)
    assert found == RUNTIME


@pytest.mark.parametrize(("given", "told"), [({}, 50), ({"top_k": None}, 50), ({"top_k": 0}, 0), ({"top_k": 7}, 7)])
def test_sampling_from_all_tokens_stays_that(given: dict[str, int | None], told: int, tmp_path: Path) -> None:
    model = tiny.make_model("llama", tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps(given))
    config = genai_config(Checkpoint(model), make_plan("onnx-cpu", Choices()), 3, [], [])
    assert config["search"]["top_k"] == told


@pytest.mark.parametrize(("flags", "captured"), [((), True), (("--no-cuda-graph",), False)])
def test_dispc_and_genai_are_told_the_same_about_cuda_graphs(
    flags: tuple[str, ...], captured: bool, tmp_path: Path
) -> None:
    line = ("compile", harness.checkpoint("llama").directory, "--dense", "-t", "onnx-cuda", "-o", tmp_path / "out")
    assert command.run(*line, "--no-validate", *flags).code == 0
    manifest, genai = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("dispc.json", "genai_config.json")
    )
    assert manifest["cuda_graph"] == captured
    options = genai["model"]["decoder"]["session_options"]["provider_options"]
    assert options == (CUDA_GRAPH if captured else NO_CUDA_GRAPH)
    assert genai["search"]["past_present_share_buffer"]


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        (Choices(without=("unroll",)), "unknown pass 'unroll'"),
        (Choices(align=0), "cannot be aligned to 0"),
        (Choices(dtype="bfloat16", lowering="canonical"), "ScatterND"),
        (Choices(dtype="bfloat16", lowering="scatter-elements"), "ScatterElements"),
    ],
    ids=str,
)
def test_choices_that_cannot_be_met_are_refused(choices: Choices, says: str) -> None:
    with pytest.raises(CompileError, match=says):
        make_plan("onnx-cuda", choices)


def test_the_default_lowering_of_a_target_runs_in_every_dtype_quantised_too() -> None:
    for target in TARGETS.values():
        for dtype in target.dtypes:
            assert make_plan(target.name, Choices(dtype=dtype)).lowering.name == target.lowering
            make_plan(target.name, Choices(dtype=dtype, lowering=target.lowering))
            if target.contrib:
                make_plan(target.name, Choices(dtype=dtype, quantisation=INT4))


def test_a_target_of_a_new_provider_takes_the_lowerings_that_run_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row of LOWERINGS names it; artifacts name their lowering, so that it is asked for by name as well."""
    row = replace(TARGETS["onnx-cuda"], name="onnx-new", provider="NewExecutionProvider")
    monkeypatch.setitem(TARGETS, row.name, row)
    for dtype in row.dtypes:
        assert make_plan(row.name, Choices(dtype=dtype)).lowering.name == row.lowering
        assert make_plan(row.name, Choices(dtype=dtype, lowering=row.lowering)).lowering.name == row.lowering
    assert make_plan(row.name, Choices(dtype="float32", lowering="canonical")).lowering.writes_by == "ScatterND"
    for lowering in ("canonical", "feature-extractor"):
        with pytest.raises(CompileError, match="ONNX Runtime cannot run"):
            make_plan(row.name, Choices(dtype="float16", lowering=lowering))


def test_a_default_lowering_is_a_column_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "onnx-cpu", replace(TARGETS["onnx-cpu"], lowering="canonical"))
    assert make_plan("onnx-cpu").lowering.name == "canonical"
    assert make_plan("onnx").lowering.name == TARGETS["onnx"].lowering != "canonical"


@pytest.mark.parametrize(
    ("target", "choices", "align"),
    [
        ("onnx-cuda", Choices(), 8),
        ("onnx-cuda", Choices(dtype="bfloat16"), 8),
        ("onnx-cuda", Choices(dtype="float32"), 1),
        ("onnx-cuda", Choices(quantisation=INT4), 32),
        ("onnx-cuda", Choices(align=1), 1),
        ("onnx-cuda", Choices(quantisation=INT4, align=64), 64),
        ("onnx-cpu", Choices(quantisation=INT4), 1),
        ("onnx", Choices(dtype="float16"), 1),
    ],
    ids=str,
)
def test_widths_are_aligned_where_cuda_kernels_want_it(target: str, choices: Choices, align: int) -> None:
    assert make_plan(target, choices).align == align
