"""docs/ci.md does what it says: its workflow's commands and its pytest example are run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import harness
import pytest
import yaml

from dispc.masks import Masks

PAGE = (Path(__file__).parents[1] / "docs" / "ci.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def workflow() -> dict[str, Any]:
    (job,) = yaml.safe_load(block("yaml"))["jobs"].values()
    return dict(job)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model` in it, in which the workflow has run but for what needs a network."""
    place, checkpoint = tmp_path_factory.mktemp("ci"), harness.checkpoint("llama")
    shutil.copytree(checkpoint.directory, place / "model")
    Masks.random(checkpoint.config, 0.5, 1).save(place / "model" / "masks.safetensors", checkpoint.config)
    job = workflow()
    for step in job["steps"]:
        if "run" in step and "pip install" not in step["run"]:
            done = run(["bash", "-euo", "pipefail", "-c", step["run"]], place, job["env"])
            assert done.returncode == 0, (step, done.stdout, done.stderr)
    return place


def run(command: list[str], place: Path, more: dict[str, str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | more | {"PATH": path, "GITHUB_STEP_SUMMARY": str(place / "step-summary")}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


def test_the_workflow_compiles_validates_and_leaves_its_reports(place: Path) -> None:
    root = ElementTree.parse(place / "report.xml").getroot()
    assert root.get("failures") == "0" and int(root.get("tests", "0")) > 10
    assert "Validation passed" in (place / "step-summary").read_text(encoding="utf-8")
    assert {path.name for path in place.glob("report.*")} == {"report.xml", "report.html", "report.json"}
    assert all(set(step) & {"run", "uses"} for step in workflow()["steps"])


def test_the_workflow_fails_where_the_artifact_is_another_models(place: Path, tmp_path: Path) -> None:
    job = workflow()
    step = next(step["run"] for step in job["steps"] if step.get("name") == "validate")
    other = {"MODEL": str(harness.checkpoint("qwen2").directory), "ARTIFACT": str(place / job["env"]["ARTIFACT"])}
    assert run(["bash", "-euo", "pipefail", "-c", step], tmp_path, other).returncode == 2


def test_the_pytest_example_passes_for_a_good_artifact(place: Path) -> None:
    (place / "test_artifact.py").write_text(block("python"), encoding="utf-8")
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(place), "test_artifact.py"]
    done = run([sys.executable, "-m", "pytest", *options], place, workflow()["env"])
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
