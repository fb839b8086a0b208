"""The benchmarks run, and what they count and compare is right. No time is asserted."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import comparison
import contenders
import cpu_decode
import gpu
import gpu_cells
import gpu_device
import gpu_jobs
import gpu_runtimes
import harness
import machine
import numpy as np
import onnx_ir as ir
import padding
import prefill
import pytest
import torch
from algorithm1 import Algorithm1
from common import BenchmarkError, compile_artifact, median_ratio
from decoder import Decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from learned_like import learned_like
from make_checkpoint import make_checkpoint, write_tokenizer
from shapes import SHAPES

from dispc.masks import Masks
from dispc.model.config import DecoderConfig
from dispc.model.families import FAMILIES
from dispc.plan import TARGETS
from dispc.validate.checks.parity import LIMITS, logit_error

CPU = {"threads": 1, "rounds": 1, "calls": 1}


def decoder_config(shape: str) -> DecoderConfig:
    sizes = SHAPES[shape]
    return DecoderConfig(
        family=FAMILIES["llama"],
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.hidden // sizes.heads,
        vocab_size=sizes.vocabulary,
        max_positions=sizes.positions,
        tied=sizes.tied,
        layer_kinds=("full_attention",) * sizes.layers,
    )


def compiled(variant: str, masks: Masks | None, directory: Path) -> Path:
    """model.onnx of a tiny artifact for the CPU."""
    path = None
    if masks is not None:
        path = directory / "masks.safetensors"
        masks.save(path, harness.checkpoint(variant).config)
    compile_artifact(harness.checkpoint(variant).directory, directory / "artifact", "onnx-cpu", path)
    return directory / "artifact" / "model.onnx"


def some_masks(variant: str, norm_scope: Any = "full") -> Masks:
    """Random masks in which a block has no attention, another no MLP, and one set is full."""
    config = harness.checkpoint(variant).config
    rows = [block.sets() for block in Masks.random(config, 0.5, 3, norm_scope=norm_scope).blocks]
    rows[1]["attention.write"] = rows[2]["mlp.mid"] = np.array([], dtype=np.int64)
    rows[0]["mlp.read"] = np.arange(config.hidden_size)
    return Masks.from_indices(rows, config, norm_scope=norm_scope)


def logits_in_two_runs(model: Any, tokens: Any) -> Any:
    """Logits [S,V] of a prompt and, behind it, of one token."""
    model.allocate(1, len(tokens) + 3)
    found = []
    for part, past in ((tokens[:-1], 0), (tokens[-1:], len(tokens) - 1)):
        step = model.bind(part[None], past)
        step.run()
        found.append(step.logits()[0])
    return np.concatenate(found)


@pytest.mark.parametrize("norm_scope", ["full", "selected"])
@pytest.mark.parametrize("variant", ["llama", "llama3-rope"])
def test_algorithm_1_computes_what_the_reference_computes(variant: str, norm_scope: Any) -> None:
    masks = some_masks(variant, norm_scope)
    found = logits_in_two_runs(Algorithm1(harness.checkpoint(variant), masks, torch.float32, "cpu"), harness.TOKENS)
    assert logit_error(found, harness.reference_logits(variant, masks)) < LIMITS["float32"]


def test_algorithm_1_refuses_what_it_does_not_compute() -> None:
    for variant in ("llama-tied-biased", "qwen2", "opt"):
        checkpoint = harness.checkpoint(variant)
        with pytest.raises(ValueError, match="LLaMA models without biases"):
            Algorithm1(checkpoint, Masks.dense(checkpoint.config), torch.float32, "cpu")


def test_a_decoder_with_shared_buffers_computes_what_the_reference_computes(tmp_path: Path) -> None:
    masks = some_masks("llama")
    model = Decoder(compiled("llama", masks, tmp_path), harness.checkpoint("llama").config, threads=1)
    found = logits_in_two_runs(model, harness.TOKENS)
    assert logit_error(found, harness.reference_logits("llama", masks)) < LIMITS["float32"]


def test_bytes_read_are_all_weights_once_a_row_of_tables_and_the_caches(tmp_path: Path) -> None:
    config = harness.checkpoint("llama").config
    model = Decoder(compiled("llama", None, tmp_path), config, threads=1)
    stored = {name: value.const_value for name, value in ir.load(model.path).graph.initializers.items()}
    sizes = {name: tensor.nbytes for name, tensor in stored.items() if tensor is not None}
    tables = [name for name in sizes if "embed_tokens" in name or name in ("cos_cache", "sin_cache")]
    weights = 4 * (config.block_parameters * config.num_hidden_layers + config.vocab_size * config.hidden_size)
    norms = 4 * (2 * config.num_hidden_layers + 1) * config.hidden_size
    cache = 4 * 2 * config.num_hidden_layers * config.key_value_size
    row = 4 * config.hidden_size
    found = [model.bytes_read(batch, past) for batch, past in ((1, 0), (1, 7), (3, 7))]
    assert found[1] - found[0] == 7 * cache
    assert weights + norms + row <= found[0] <= weights + norms + row + 2**13  # the rest: rows of cosines, constants
    assert row + 7 * cache <= (found[2] - found[1]) / 2 <= row + 7 * cache + 2**13
    assert sum(sizes[name] for name in tables) > 2**14  # so that the upper bounds say something


def test_pytorch_reads_as_many_bytes_as_the_dense_artifact(tmp_path: Path) -> None:
    checkpoint = harness.checkpoint("llama")
    onnx = Decoder(compiled("llama", None, tmp_path), checkpoint.config, threads=1).bytes_read(2, 9)
    pytorch = Algorithm1(checkpoint, Masks.dense(checkpoint.config), torch.float32, "cpu").bytes_read(2, 9)
    assert pytorch <= onnx <= 1.05 * pytorch


def test_operations_of_a_prompt_are_those_of_its_matrices() -> None:
    config = decoder_config("tiny")
    dense = Masks.dense(config)
    weights = config.block_parameters * config.num_hidden_layers + config.vocab_size * config.hidden_size
    one, two = (prefill.operations(config, dense, length, last_logits=False) for length in (1, 2))
    assert one == 2 * weights + 4 * config.num_hidden_layers * config.query_size
    assert two - 2 * one == 4 * config.num_hidden_layers * config.query_size  # one pair of positions more
    head = 2 * config.vocab_size * config.hidden_size
    assert two - prefill.operations(config, dense, 2, last_logits=True) == head


@settings(max_examples=8)
@given(
    shape=st.sampled_from(["llama-2-7b", "llama-2-13b"]),
    kept=st.sampled_from([0.5, 0.6, 0.7, 0.8]),
    seed=st.integers(0, 1000),
)
def test_learned_like_widths_meet_the_budget_and_are_uneven(shape: str, kept: float, seed: int) -> None:
    config = decoder_config(shape)
    masks = learned_like(config, kept, seed)
    total = config.block_parameters * config.num_hidden_layers
    assert masks.kept_parameters(config) == pytest.approx(kept * total, rel=1e-3)
    shares: dict[str, list[float]] = {name: [] for name in masks.blocks[0].sets()}
    for block in masks.blocks:
        for name, indices in block.sets().items():
            full = config.intermediate_size if name == "mlp.mid" else config.hidden_size
            shares[name].append(len(indices) / full)
    for name, values in shares.items():
        assert len(set(values)) == len(values), name
    assert max(shares["mlp.mid"]) < min(shares["mlp.read"] + shares["mlp.write"])
    late = shares["attention.read"][config.num_hidden_layers // 2 :]
    assert sorted(late)[3] < min(shares["attention.read"][: config.num_hidden_layers // 2])  # several nearly vanish


def test_ratios_are_taken_round_by_round() -> None:
    assert median_ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0  # the second round was slow for both


def test_the_tokenizer_of_a_made_checkpoint_loads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_checkpoint(tmp_path, "tiny")
    write_tokenizer(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("<s> word </s>")["input_ids"] == [1, 0, 2]


def smoke(script: Any, directory: Path, **options: Any) -> dict[str, Any]:
    """The result of a script with --smoke, whose `main` takes its options as such or as `Options`."""
    options |= {"smoke": True, "json_file": directory / "result.json", "work": directory / "work"}
    if hasattr(script, "Options"):
        script.main(script.Options(**options))
    else:
        script.main(**options)
    found: dict[str, Any] = json.loads((directory / "result.json").read_text())
    assert found["smoke"] and found["environment"]["packages"] and not (directory / "work").exists()
    return found


def test_cpu_decode_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "_git", lambda *arguments: " M dispc/cli.py\n?? passes/new.py")
    found = smoke(cpu_decode, tmp_path, threads=1)
    assert "WARNING: 2 files of dispc differ from the revision" in " ".join(capsys.readouterr().out.split())
    assert found["lowering"] == TARGETS["onnx-cpu"].lowering
    assert found["past_8"][contenders.PRUNED]["bytes_read"] < found["past_8"][contenders.DENSE]["bytes_read"]
    assert found["past_8"]["bytes_ratio"] > 1 and found["goals"] == {}
    assert set(found["logit_differences"]) == {f"{contenders.PRUNED} / {contenders.PYTORCH}"}


def test_a_lowering_is_measured_as_asked_with_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "remove", lambda path: None)
    script: dict[str, Any] = {"json_file": tmp_path / "result.json", "work": tmp_path, "threads": 1, "smoke": True}
    for quantize in (None, "int4"):
        cpu_decode.main(cpu_decode.Options(lowering="canonical", quantize=quantize, **script))
        found = json.loads((tmp_path / "result.json").read_text())
        assert found["lowering"] == "canonical" and found["past_8"]["bytes_ratio"] > 1
        graphs = {name: ir.load(tmp_path / f"dispc-{name}" / "model.onnx").graph for name in ("dense", "pruned")}
        operators = {name: [node.op_type for node in graph] for name, graph in graphs.items()}
        assert "ScatterND" in operators["pruned"] and "ScatterND" not in operators["dense"]
        assert all(("MatMulNBits" in names) == (quantize is not None) for names in operators.values())


def test_prefill_runs(tmp_path: Path) -> None:
    config = decoder_config("tiny")
    masks = tmp_path / "masks.safetensors"
    Masks.random(config, 0.5, 1).save(masks, config)
    found = smoke(prefill, tmp_path, threads=1, masks=masks, lowering="scatter-elements")
    assert found["length_32"]["operations_ratio"] > 1 and found["masks"] == masks.name
    assert found["lowering"] == "scatter-elements"


def test_nothing_is_timed_when_two_models_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks, other = (Masks.random(harness.checkpoint("llama").config, 0.5, seed) for seed in (1, 2))
    masks.save(tmp_path / "masks.safetensors", harness.checkpoint("llama").config)
    monkeypatch.setattr(
        contenders,
        "Algorithm1",
        lambda checkpoint, masks, *rest, **options: Algorithm1(checkpoint, other, *rest, **options),
    )
    with pytest.raises(BenchmarkError, match="logits differ"):
        contenders.prepare(
            contenders.Setup(
                model=harness.checkpoint("llama").directory,
                masks=tmp_path / "masks.safetensors",
                work=tmp_path,
                threads=1,
            )
        )


def test_what_nvidia_smi_says_is_recorded_and_nothing_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_device.describe_device("cpu")["device"]["graphics_cards"] is None
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.1, 1980 MHz, 2619 MHz, 1755 MHz, 2619 MHz, 700.00 W, 41'\n")
    smi.chmod(0o755)
    (card,) = gpu_device.describe_device("cpu")["device"]["graphics_cards"]
    assert (card["driver_version"], card["clocks.max.sm"], card["clocks.sm"]) == ("580.1", "1980 MHz", "1755 MHz")
    smi.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert gpu_device.describe_device("cpu")["device"]["graphics_cards"] is None


def test_gpu_runs_on_the_cpu(tmp_path: Path) -> None:
    found = smoke(gpu, tmp_path, lowerings="canonical")
    cells = found["cells"]
    assert {(cell["pruned"], cell["runtime"], cell["lowering"]) for cell in cells} == {
        (0, "PyTorch", None),
        (0, "PyTorch compiled", None),
        (0, "ORT", None),
        (50, "PyTorch", None),
        (50, "PyTorch compiled", None),
        (50, "ORT", "canonical"),
    }
    assert [cell for cell in cells if "milliseconds" not in cell] == []
    assert all("speedup" in cell for cell in cells if cell["pruned"])
    assert all(cell["logit_difference"] < 2 * LIMITS["float32"] for cell in cells if cell["runtime"] != "PyTorch")
    indexing = {
        (cell["pruned"], cell["phase"]): cell["indexing"]["share"] for cell in cells if cell["runtime"] == "ORT"
    }
    assert {*indexing} == {(pruned, phase) for pruned in (0, 50) for phase in ("decode", "prefill")}
    assert all(0 < share < 1 for share in indexing.values())
    assert found["device"]["copy_gb_per_second"] > 0


@pytest.fixture
def job(tmp_path: Path) -> gpu_jobs.Job:
    cells = (gpu_jobs.Cell(phase="decode", batch=1, tokens=4),)
    return gpu_jobs.Job(
        model=str(harness.checkpoint("llama").directory),
        masks=None,
        artifact=str(tmp_path / "artifact"),
        reference=str(tmp_path / "reference.npy"),
        runtimes=("ORT",),
        device="cpu",
        dtype="float32",
        cells=cells,
        rounds=1,
        calls=1,
    )


def test_wrong_logits_are_recorded_and_not_timed(job: gpu_jobs.Job, tmp_path: Path) -> None:
    compiled("llama", some_masks("llama"), tmp_path)
    eager = gpu_cells.run_job(replace(job, artifact=None, runtimes=gpu_jobs.PYTORCH[job.device]))
    assert [next(eager).get("runtime") for _ in range(2)] == [None, "PyTorch"]  # it leaves the dense model's logits
    _, cell = gpu_cells.run_job(job)
    assert "logits differ" in cell["error"] and "milliseconds" not in cell
    Path(job.reference).unlink()
    _, cell = gpu_cells.run_job(job)
    assert "nothing is timed" in cell["error"]


def test_a_process_that_dies_leaves_errors_for_its_cells(
    job: gpu_jobs.Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho '{\"device\": {}}'\necho out of luck >&2\nexit 3\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    found: list[dict[str, Any]] = []
    gpu.run_job(job, 60, tmp_path, {}, found.append)
    assert [cell.get("error") for cell in found] == [None, "the process ended with 3: out of luck"]


def test_what_does_not_fit_is_skipped_with_the_reason(job: gpu_jobs.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(device: str, needed: int, what: str) -> None:
        raise MemoryError(f"{what} need {needed}")

    monkeypatch.setattr(gpu_runtimes, "require_memory", no_memory)
    _, cell = gpu_cells.run_job(job)
    assert cell["skipped"].startswith("weights need") and "error" not in cell


def test_gpu_goals_compare_the_fastest_rows_of_onnx_runtime() -> None:
    def cell(pruned: int, runtime: str, milliseconds: float, **more: Any) -> dict[str, Any]:
        times = {"milliseconds": {"median": milliseconds}, "gb_per_second": 900.0}
        base = {"shape": "s", "pruned": pruned, "runtime": runtime, "phase": "decode", "batch": 1, "tokens": 512}
        return base | times | more

    cells = [cell(0, "ORT", 5), cell(0, "ORT, CUDA graph", 4), cell(0, "PyTorch", 3), cell(50, "ORT", 2)]
    assert list(gpu.judge(cells, 1000).values()) == [True, True]  # 2.0 times, 0.90 of the copy
    assert list(gpu.judge([*cells, cell(0, "ORT", 3)], 1200).values()) == [False, False]
    assert gpu.judge([cell(50, "ORT", 2)], 1000) == {}
    assert [c.get("speedup") for c in gpu.with_speedups(cells)] == [None, None, None, 2.5]


def test_the_cost_of_padding_is_measured_beside_the_same_artifact_with_caches_that_grow(tmp_path: Path) -> None:
    found = smoke(padding, tmp_path, threads=1)
    for case in ("past_8", "past_16", "prompt_8"):
        assert [*found[case]] == [padding.SHARED, padding.GROWING, padding.LEFT]
        assert found[case][padding.SHARED]["ratio"] == 1.0
