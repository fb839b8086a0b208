"""The benchmarks run, and time only models that compute the same. No time is asserted."""

import json
from pathlib import Path
from typing import Any

import comparison
import contenders
import cpu_decode
import harness
import machine
import onnx_ir as ir
import padding
import prefill
import pytest
from algorithm1 import Algorithm1
from common import BenchmarkError
from measured import decoder_config, smoke

from dispc.masks import Masks
from dispc.targets import TARGETS


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


def test_the_cost_of_padding_is_measured_beside_the_same_artifact_with_caches_that_grow(tmp_path: Path) -> None:
    found = smoke(padding, tmp_path, threads=1)
    for case in ("past_8", "past_16", "prompt_8"):
        assert [*found[case]] == [padding.SHARED, padding.GROWING, padding.LEFT]
        assert found[case][padding.SHARED]["ratio"] == 1.0
