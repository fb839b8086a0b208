"""The doctor on a machine without the CUDA libraries, and on one with stand-ins for them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import command
import cuda_stub as stub_libraries
import harness
import pytest

from dispc.compiler import CompileOptions, compile_model
from dispc.manifest import BlockParameters, LoweringChoice, Manifest
from dispc.runtime import doctor
from dispc.runtime.providers import CPU
from dispc.support.files import write_json
from dispc.validate.comparison import choose_provider

HAVE_CUDA = doctor.cuda_problem() is None
without_cuda = pytest.mark.skipif(HAVE_CUDA, reason="CUDA loads on this machine")


def dispc(*arguments: object, stub: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    line, env = [sys.executable, "-m", "dispc", *map(str, arguments)], stub_libraries.environment(stub) | variables
    return subprocess.run(line, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def cuda_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cuda") / "out"
    model = harness.checkpoint("llama").directory
    compile_model(CompileOptions(model=model, output=out, target="onnx-cuda", dense=True, validate=False))
    return out


@without_cuda
def test_without_the_libraries_the_doctor_names_them_and_what_brings_them() -> None:
    outcome = command.run("doctor", "--json")
    assert outcome.code == 1
    found = json.loads(outcome.out)
    missing = {entry["name"]: entry["remedy"] for entry in found["findings"] if not entry["ok"]}
    provider = doctor.provider_library()
    assert provider is not None
    lacking = [name for name in doctor.needed_libraries(provider) if not doctor._loads(name)]
    assert lacking and set(lacking) <= set(missing)
    for library in lacking:
        expected = "the NVIDIA driver" if library.startswith("libcuda.so") else "onnxruntime-gpu[cuda,cudnn]"
        assert expected in missing[library]
        assert library in found["problem"]
    table = command.run("doctor")
    assert table.code == 1
    assert "CUDA does not work" in table.out and "Traceback" not in table.out + table.err


def test_with_stand_ins_for_the_libraries_the_doctor_is_content(cuda_stub: Path) -> None:
    done = dispc("doctor", "--json", stub=cuda_stub)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["problem"] is None
    assert all(entry["ok"] for entry in found["findings"])


def test_one_missing_library_is_the_one_that_is_named(cuda_stub: Path, tmp_path: Path) -> None:
    for library in cuda_stub.glob("*.so.*"):
        if library.name.startswith("libcublasLt") and library.suffix.lstrip(".").isdigit():
            continue
        (tmp_path / library.name).symlink_to(library)
    done = dispc("doctor", "--json", stub=tmp_path)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    names = [entry["name"] for entry in found["findings"] if not entry["ok"] and ".so" in entry["name"]]
    assert all(name.startswith("libcublas") for name in names)
    assert any(name.startswith("libcublasLt") for name in names)


def test_the_needed_libraries_are_those_that_readelf_reads() -> None:
    provider = doctor.provider_library()
    if provider is None:
        pytest.skip("this onnxruntime has no CUDA provider")
    try:
        dynamic = subprocess.check_output(["readelf", "-d", provider], text=True)
    except FileNotFoundError:
        pytest.skip("no readelf")
    assert doctor.needed_libraries(provider) == re.findall(r"NEEDED.*\[(lib(?:cu|nv)\w+\.so\.\d+)\]", dynamic)


@without_cuda
def test_validating_a_cuda_artifact_without_cuda_ends_with_2_and_the_reason(cuda_artifact: Path) -> None:
    model = harness.checkpoint("llama").directory
    outcome = command.run("validate", cuda_artifact, "-r", model)
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    for phrase in ("is for CUDA", "cannot be loaded", "onnxruntime-gpu[cuda,cudnn]", "dispc doctor", "--on-cpu"):
        assert phrase in line


def test_on_cpu_judges_there_and_says_so_in_the_first_line(cuda_artifact: Path) -> None:
    outcome = command.run("validate", cuda_artifact, "-r", harness.checkpoint("llama").directory, "--on-cpu", "--json")
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    assert "judged on CPUExecutionProvider instead of CUDAExecutionProvider (chosen)" in report["headline"]
    placement = next(check for check in report["checks"] if check["name"] == "placement")
    assert placement["status"] == "skipped"


@without_cuda
def test_compiling_for_cuda_without_cuda_judges_on_the_cpu_and_keeps_that_in_the_manifest(tmp_path: Path) -> None:
    options = CompileOptions(
        model=harness.checkpoint("llama").directory, output=tmp_path / "out", target="onnx-cuda", dense=True
    )
    validation = compile_model(options).validation
    assert validation is not None and validation["passed"]
    for phrase in ("CPUExecutionProvider instead of CUDAExecutionProvider", "cannot be loaded"):
        assert phrase in validation["headline"]
    assert json.loads((tmp_path / "out" / "dispc.json").read_text())["validation"] == validation


def test_an_artifact_for_the_cpu_asks_for_no_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "cuda_problem", lambda: pytest.fail("asked"))
    manifest = Manifest(
        dispc="",
        model_type="",
        target="onnx-cpu",
        dtype="float32",
        padding="right",
        lowering=LoweringChoice(name=""),
        attention="",
        positions=64,
        stop_tokens=(),
        norm_scope="",
        masks_sha256="",
        config_sha256="",
        block_parameters=BlockParameters(dense=1, kept=1),
        nodes=1,
        bytes=1,
    )
    write_json(tmp_path / "dispc.json", manifest.to_json())
    assert choose_provider(tmp_path, "target") == (CPU, "")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_with_stand_ins_validation_runs_on_cuda_and_places_every_node_there(
    dtype: str, cuda_stub: Path, tmp_path: Path
) -> None:
    """No kernel computes anything there, so that parity fails; all else of the road is real."""
    model, out = harness.checkpoint("llama").directory, tmp_path / "out"
    compile_model(CompileOptions(model=model, output=out, target="onnx-cuda", dtype=dtype, dense=True, validate=False))
    log = tmp_path / "graphs"
    done = dispc("validate", out, "-r", model, "--json", stub=cuda_stub, CUDA_STUB_LOG=str(log))
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["judged_on"] == f"CUDAExecutionProvider, {dtype} as is"
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["placement"]["status"] == "passed", checks["placement"]
    assert report["placement"]["nodes"]["CUDAExecutionProvider"] > 30
    assert checks["CUDA graph replay"]["status"] == "failed"
    assert graphs(log) == [48 + 36]  # captured once, after the first prompt; every step launches it


def graphs(log: Path) -> list[int]:
    """How often each CUDA graph that was captured has been launched."""
    lines = [tuple(line.split()) for line in log.read_text().splitlines()]
    captured = [graph for what, graph in lines if what == "capture"]
    assert len(captured) == len(set(captured))
    return [lines.count(("launch", graph)) for graph in captured]


def test_every_length_is_timed_with_a_cuda_graph_of_its_own(
    cuda_artifact: Path, cuda_stub: Path, tmp_path: Path
) -> None:
    model, log = harness.checkpoint("llama").directory, tmp_path / "graphs"
    line = ("validate", cuda_artifact, "-r", model, "--json", "--latency", "--past", 8, "--past", 32, "--rounds", 3)
    done = dispc(*line, stub=cuda_stub, CUDA_STUB_LOG=str(log))
    assert done.returncode == 1, done.stderr  # parity; see above
    rows = [row["name"] for row in json.loads(done.stdout)["latency"]["rows"] if row["cuda_graph"]]
    assert rows == [f"one token, batch 1, past {past}, CUDA graph" for past in (8, 32)]
    launched = sorted(graphs(log))
    assert len(launched) == 4  # the replay check, the warm-up of the longest, and the two that were timed
    assert launched[1] == launched[2] == 6  # 3 runs after 3


def test_a_device_that_does_not_answer_is_told_with_the_reason(cuda_artifact: Path, cuda_stub: Path) -> None:
    model = harness.checkpoint("llama").directory
    done = dispc("doctor", "--json", stub=cuda_stub, CUDA_STUB_FAILURE="35")
    assert done.returncode == 1
    problem = json.loads(done.stdout)["problem"]  # nothing else is on standard output
    assert "CUDA failure 35" in problem and "update the NVIDIA driver" in problem and "onnxruntime_src" not in problem
    done = dispc("validate", cuda_artifact, "-r", model, stub=cuda_stub, CUDA_STUB_FAILURE="100")
    assert (done.returncode, done.stdout) == (2, "")
    assert "CUDA failure 100" in done.stderr and "CUDA_VISIBLE_DEVICES" in done.stderr
