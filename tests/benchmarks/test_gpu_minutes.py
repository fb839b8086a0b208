"""gpu_minutes.py on fake scripts: what hangs, dies or says nothing costs its own cells and no others."""

import json
import time
from pathlib import Path
from typing import Any

import gpu_jobs
import gpu_minutes
import gpu_stages
import pytest
from gpu_jobs import Cell
from gpu_prepare import VARIANTS, Preparation

CELL = Cell(phase="decode", batch=1, tokens=8)


@pytest.fixture
def run(tmp_path: Path) -> gpu_stages.Run:
    """A run that collects what is recorded in `run.found`, with artifacts that are only marked as made."""
    found: list[dict[str, Any]] = []
    preparation = Preparation(
        shape="tiny", target="onnx-cpu", folders=(str(tmp_path),), variants=tuple(VARIANTS), workers=1
    )
    made = gpu_stages.Run(
        device="cpu",
        dtype="float32",
        preparation=preparation,
        prepared=None,
        workers=1,
        model=None,
        data=None,
        work=tmp_path,
        record=found.append,
        sizes=gpu_stages.SMOKE_SIZES,
        end=time.monotonic() + 30,
    )
    made.found = found  # type: ignore[attr-defined]
    return made


def fake(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """gpu_cells.py becomes a script that runs `body` for each job (`job` its number, `left` how many follow)."""
    script = folder / "gpu_cells.py"
    script.write_text(
        "import json, os, sys, time\n"
        "for job, argument in enumerate(sys.argv[1:]):\n"
        "    asked = json.loads(argument)\n"
        "    name = asked['artifact'] or ''\n"
        "    cell = {'job': job, 'runtime': asked['runtimes'][0]} | asked['cells'][0]\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        + "    print(json.dumps(cell | {'milliseconds': 1}), flush=True)\n"
    )
    monkeypatch.setattr(gpu_jobs, "SCRIPT", script)


def prepare(folder: Path, *names: str) -> None:
    for name in names:
        directory = folder / name.replace(", ", "-").replace(" ", "-")
        directory.mkdir()
        (directory / "dispc.json").touch()


def by_lowering(run: gpu_stages.Run) -> dict[str, str]:
    found: list[dict[str, Any]] = run.found  # type: ignore[attr-defined]
    return {str(row["lowering"]): row.get("error", "measured") for row in found if "lowering" in row}


def test_a_job_that_kills_its_process_costs_its_own_cells_only(
    run: gpu_stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(
        monkeypatch,
        tmp_path,
        "print(json.dumps({'job': job, 'device': {}}), flush=True)\n"
        "if name.endswith('canonical'): print('out of luck', file=sys.stderr); os.kill(os.getpid(), 11)",
    )
    prepare(tmp_path, "dense", "canonical", "inverse-gather")
    run.measure_artifacts(["dense", "canonical", "inverse-gather"], [CELL])
    found = by_lowering(run)
    assert found["dense"] == found["inverse-gather"] == "measured"
    assert found["canonical"] == "the process ended with -11: out of luck"


def test_what_hangs_ends_with_its_stage_and_its_children_too(
    run: gpu_stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = "import os, subprocess; p = subprocess.Popen(['sleep', '60']); open('PID', 'w').write(str(p.pid)); p.wait()"
    fake(monkeypatch, tmp_path, f"exec({child.replace('PID', str(tmp_path / 'pid'))!r})")
    prepare(tmp_path, "dense")
    run.end = time.monotonic() + 3
    started = time.monotonic()
    run.measure_artifacts(["dense", "inverse-gather"], [CELL])
    assert time.monotonic() - started < 20
    assert "stopped after" in by_lowering(run)["dense"]
    assert by_lowering(run)["inverse-gather"] == "came too late"
    if (tmp_path / "pid").exists():
        assert ended((tmp_path / "pid").read_text())


def ended(process: str) -> bool:
    """Whether a killed process is gone within 10 s: a signal is delivered when the process next gets a core."""
    stat, end = Path("/proc", process, "stat"), time.monotonic() + 10
    while time.monotonic() < end:
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_what_says_nothing_is_an_error_and_noise_is_not_a_result(
    run: gpu_stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, tmp_path, "print('library noise')\nprint('[1, 2]')\nbreak")
    prepare(tmp_path, "dense")
    run.measure_artifacts(["dense"], [CELL])
    assert by_lowering(run) == {"dense": "not measured"}


def test_artifacts_that_could_not_be_made_are_not_waited_for(run: gpu_stages.Run) -> None:
    run.failed.add("dense")
    started = time.monotonic()
    run.measure_artifacts(["dense"], [CELL])
    assert time.monotonic() - started < 5


def test_stages_share_the_minutes_and_pass_on_what_they_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    stages = tuple(
        gpu_stages.Stage(name=name, seconds=seconds, run=lambda run: limits.append(run.left))
        for name, seconds in (("one", 1.0), ("two", 3.0))
    )
    monkeypatch.setattr(gpu_minutes, "STAGES", stages)
    idle = tmp_path / "gpu_prepare.py"
    idle.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(gpu_minutes, "HERE", tmp_path)
    result = tmp_path / "result.json"
    started = time.monotonic()
    gpu_minutes.main(
        minutes=1,
        stages="one,two",
        prepared=None,
        model=None,
        data=None,
        folders=str(tmp_path / "work"),
        workers=1,
        json_file=result,
        reuse=False,
        smoke=True,
    )
    assert time.monotonic() - started < 30  # preparing is given up at the end
    assert 10 < limits[0] <= 15 and 40 < limits[1] <= 60  # a quarter, then all that is left
    kept = json.loads(result.read_text())
    assert [stage["name"] for stage in kept["stages"]] == ["one", "two"]
    assert "| two |" in result.with_suffix(".md").read_text()
