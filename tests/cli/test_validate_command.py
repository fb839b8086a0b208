"""`dispc validate` as a command: where reports may go, which options go together, how it ends when it cannot run."""

import shutil
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import command
import faults
import onnx_ir as ir
import pytest
from artifacts import originals
from command import assert_refused

from dispc.runtime import memory
from dispc.runtime.latency import measure_latency
from dispc.runtime.providers import CPU
from dispc.validate import LatencyOptions
from dispc.validate.checks.scenarios import Scenario, ScenarioRun, run_scenario
from dispc.validate.client import Client


@pytest.mark.parametrize("place", ["directory", "twice", "data", "artifact", "reference"])
def test_a_report_has_a_place_of_its_own_or_nothing_is_touched(place: str, tmp_path: Path) -> None:
    good, _, model = originals()
    artifact, reference = shutil.copytree(good, tmp_path / "out"), shutil.copytree(model, tmp_path / "model")
    data = tmp_path / "text.txt"
    data.write_text("the sea")
    path = {
        "directory": tmp_path,
        "data": tmp_path / "." / "text.txt",
        "twice": tmp_path / "new",
        "artifact": artifact / "dispc.json",
        "reference": reference / "config.json",
    }[place]
    line = ("validate", artifact, "-r", reference, "--data", data, "--json-file", path)
    assert_refused(tmp_path, *line, *(["--html", path] if place == "twice" else []), says=(str(path),))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--past", 64], "--past goes with --latency"),
        (["--rounds", 3], "--rounds goes with --latency"),
        (["--threads", 0], "--threads goes with --latency"),
        (["--max-windows", 2], "--max-windows goes with --data FILE"),
        (["--dense", "OUT", "--build-dense"], "--dense goes with no --build-dense"),
        (["--max-error", "inf"], "--max-error is inf; a limit is a finite number"),
        (["--max-kl", "nan"], "--max-kl is nan"),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_refused(options: list[object], says: str, tmp_path: Path) -> None:
    good, _, model = originals()
    words = [good if word == "OUT" else word for word in options]
    assert_refused(tmp_path, "validate", good, "-r", model, *words, says=(says,))


def test_whatever_goes_wrong_is_in_the_reports_and_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, _, model = originals()
    monkeypatch.setattr("dispc.validate.comparison.run_scenario", Mock(side_effect=ZeroDivisionError))
    outcome = command.run("validate", good, "-r", model, "--junit", tmp_path / "j", "--markdown", tmp_path / "m")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and "unexpected ZeroDivisionError" in outcome.err
    assert ElementTree.parse(tmp_path / "j").find(".//error") is not None
    assert "could not run" in (tmp_path / "m").read_text()


def test_a_report_that_cannot_be_written_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, _, model = originals()

    def meanwhile(scenario: Scenario, client: Client) -> ScenarioRun:
        (tmp_path / "r.json").mkdir(exist_ok=True)
        return run_scenario(scenario, client)

    monkeypatch.setattr("dispc.validate.comparison.run_scenario", meanwhile)
    outcome = command.run(
        "validate", good, "-r", model, "--json-file", tmp_path / "r.json", "--junit", tmp_path / "r.xml"
    )
    assert outcome.code == 2 and "r.json" in outcome.err.replace("\n", "")
    assert "PASSED" in outcome.out.upper() and ElementTree.parse(tmp_path / "r.xml") is not None


def test_logits_of_another_vocabulary_are_told(tmp_path: Path) -> None:
    good, _, model = originals()

    def cut(graph: ir.Model) -> None:
        for name in ("lm_head.weight", "lm_head.bias"):
            faults.replace(graph, name, faults.initializer(graph, name)[..., :-1])
        for value in (node.outputs[0] for node in graph.graph if (node.name or "").startswith("/lm_head/")):
            value.shape = ir.Shape(["batch", "sequence", 130])

    def rename(graph: ir.Model) -> None:
        next(value for value in graph.graph.outputs if value.name == "logits").name = "scores"

    for fault, says in ((cut, "logits has 130 columns"), (rename, "it has no output logits")):
        outcome = command.run("validate", faults.plant(fault, good, tmp_path / fault.__name__), "-r", model)
        assert outcome.code == 2 and says in outcome.err.replace("\n", " "), outcome.err


def test_nothing_of_the_users_folder_is_imported_to_time_an_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, _, _ = originals()
    (tmp_path / "random.py").write_text("raise SystemExit('executed')")
    monkeypatch.chdir(tmp_path)
    options = LatencyOptions(prompts=(4,), pasts=(4,), rounds=1, warmup=0, threads=1)
    assert measure_latency(good, None, options, CPU).rows


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "CGROUPS", ((str(limit), str(used)),))
    machine = memory.available_memory()
    limit.write_text("3000\n"), used.write_text("1000\n")
    assert memory.available_memory() == 2000
    limit.write_text("max\n")
    assert machine is not None and memory.available_memory() == pytest.approx(machine, rel=0.2)
