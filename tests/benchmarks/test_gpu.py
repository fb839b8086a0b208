"""gpu.py on the CPU: every cell has a figure or a reason. No time is asserted."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import gpu_cells
import gpu_device
import gpu_jobs
import gpu_runtimes
import harness
import pytest
from measured import compiled, smoke, some_masks

from dispc.validate.checks.parity import LIMITS


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
