"""What overwrote what among the builds of ONNX Runtime, and that the commands which mend it do.

In an environment of its own, with real pip and stand-ins for the two packages: a few files each, of the same names.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dispc.runtime import build
from dispc.runtime.build import GPU, GPU_PLATFORMS, MODULE, Build, mend

ROOT = Path(__file__).parents[2]
QUESTION = """
import json
from dispc.runtime.build import builds, fault, mend, unusable
found = builds()
names = [build.name for build in found]
print(json.dumps({"names": names, "fault": fault(found), "mend": mend(found), "unusable": unusable()}))
"""


def wheel(directory: Path, name: str, files: dict[str, str]) -> None:
    """A wheel of version 1.31.1 with these files."""
    info = f"{name.replace('-', '_')}-1.31.1.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31.1\n"
        "Provides-Extra: cuda\nProvides-Extra: cudnn\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [f"{path},{_digest(text)},{len(text)}" for path, text in files.items()]
    with zipfile.ZipFile(directory / f"{name.replace('-', '_')}-1.31.1-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]))


def _digest(text: str) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


class Environment:
    """A fresh environment, whose pip finds the two stand-ins and nothing else."""

    def __init__(self, directory: Path) -> None:
        wheels = directory / "wheels"
        wheels.mkdir()
        module = {"onnxruntime/__init__.py": f"{' = '.join(build.NAMES)} = None\n"}
        wheel(wheels, GPU, module | {"onnxruntime/lib.so": "gpu", "onnxruntime/cuda.so": "cuda"})
        wheel(wheels, MODULE, module | {"onnxruntime/lib.so": "for CPUs"})
        venv.create(directory / "env", with_pip=True)
        (self.packages,) = (directory / "env" / "lib").glob("python*/site-packages")
        variables = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        path = f"{directory / 'env' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        alone = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
        self.variables = variables | alone | {"PATH": path, "PYTHONPATH": str(ROOT)}

    def run(self, command: str) -> None:
        subprocess.run(["bash", "-ec", command], env=self.variables, check=True, capture_output=True)

    def ask(self) -> dict[str, Any]:
        line = ["python", "-c", QUESTION]
        found: dict[str, Any] = json.loads(subprocess.check_output(line, env=self.variables, text=True))
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("builds"))


@pytest.fixture
def environment(made: Environment) -> Iterator[Environment]:
    yield made
    made.run(
        f"pip uninstall -y {GPU} {MODULE}; rm -rf $(dirname $(which python))/../lib/python*/site-packages/{MODULE}"
    )


def test_a_whole_build_is_found_and_nothing_is_to_be_done(environment: Environment) -> None:
    environment.run(f"pip install {GPU}")
    found = environment.ask()
    assert (found["names"], found["fault"], found["unusable"]) == ([GPU], None, None)


@pytest.mark.skipif(not build.has_gpu_build(), reason="onnxruntime-gpu has no wheels here")
@pytest.mark.parametrize(
    ("broken", "says", "usable"),
    [
        (
            f"pip install {GPU}; pip install {MODULE}",
            "1 of 3 files of onnxruntime-gpu 1.31.1 were overwritten by",
            True,
        ),
        (f"pip install {GPU}; pip install {MODULE}; pip uninstall -y {MODULE}", "2 of 3 files of .* are gone", False),
        (f"pip install {MODULE} {GPU}; pip uninstall -y {MODULE}", "files of onnxruntime-gpu 1.31.1 are gone", False),
        ("true", "no package that brings ONNX Runtime is installed", False),
    ],
    ids=["overwritten", "gutted", "gutted the other way", "nothing"],
)
def test_what_is_printed_mends_it(broken: str, says: str, usable: bool, environment: Environment) -> None:
    environment.run(broken)
    found = environment.ask()
    assert re.search(says, found["fault"])
    assert (found["unusable"] is None) == usable
    assert usable or found["mend"] in found["unusable"]
    environment.run(found["mend"])
    mended = environment.ask()
    assert (mended["names"], mended["fault"], mended["unusable"]) == ([GPU], None, None)


def test_the_cpu_build_gives_way_to_the_one_for_gpus(environment: Environment) -> None:
    environment.run(f"pip install {MODULE}")
    assert environment.ask()["fault"] is None
    environment.run(mend((Build(name=MODULE, version="1.31.1", files=2, missing=0, changed=0),)))
    assert environment.ask()["names"] == [GPU if build.has_gpu_build() else MODULE]


BROKEN = {
    "emptied": "",  # what is left when its files were uninstalled
    "half written": "class InferenceSession: pass",
    "without a library": "raise OSError('libonnxruntime.so: cannot open shared object file')",
    "of another kind": "import sys; sys.no_such_name",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_module_ends_commands_with_one_line_that_mends_it(what: str, tmp_path: Path) -> None:
    (tmp_path / MODULE).mkdir()
    (tmp_path / MODULE / "__init__.py").write_text(BROKEN[what])
    variables = os.environ | {"PYTHONPATH": str(tmp_path)}
    for arguments in (["validate", "OUT", "-r", "MODEL"], ["generate", "OUT", "x"]):
        done = subprocess.run(
            [sys.executable, "-m", "dispc", *arguments], env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "ONNX Runtime cannot be imported" in line and "pip install" in line
    doctor = subprocess.run(
        [sys.executable, "-m", "dispc", "doctor"], env=variables, capture_output=True, text=True, check=False
    )
    assert doctor.returncode == 1 and doctor.stderr == ""
    assert "CUDA does not work" in doctor.stdout and "ONNX Runtime cannot be imported" in doctor.stdout


def test_where_there_is_no_build_for_gpus_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert mend(()) == "pip install onnxruntime"


def test_the_markers_choose_one_build_for_every_platform() -> None:
    """pyproject.toml asks for exactly one package that brings the module, onnxruntime-gpu where it has wheels."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirements, names in (
        (project["dependencies"], (GPU, MODULE)),
        (project["optional-dependencies"]["genai"], ("onnxruntime-genai-cuda", "onnxruntime-genai")),
    ):
        asked = [Requirement(line) for line in requirements if line.startswith("onnxruntime")]
        for system, platform, machine in (
            ("Linux", "linux", "x86_64"),
            ("Linux", "linux", "aarch64"),
            ("Darwin", "darwin", "arm64"),
            ("Windows", "win32", "AMD64"),
            ("Windows", "win32", "ARM64"),
            ("Darwin", "darwin", "x86_64"),
        ):
            here = {"sys_platform": platform, "platform_machine": machine}
            chosen = [one.name for one in asked if one.marker is None or one.marker.evaluate(here)]
            assert chosen == [names[0] if (system, machine) in GPU_PLATFORMS else names[1]]


def test_onnx_runtime_is_imported_in_one_place() -> None:
    """Elsewhere a broken installation would be an unexpected AttributeError."""
    found = [
        path.name
        for folder in ("dispc", "passes", "validate")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(import onnxruntime\b|from onnxruntime import)", path.read_text(), re.MULTILINE)
    ]
    assert found == ["ort.py"]
