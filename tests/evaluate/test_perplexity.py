"""Perplexity: the protocol against its definition, and the same figure from torch and from the artifact."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import harness
import numpy as np
import pytest
import torch
from command import assert_refused, run
from safetensors.torch import load_file, save_file

from dispc.evaluate import evaluate, perplexity
from dispc.evaluate.perplexity import ArtifactScorer, TorchScorer, logits_of, measure_perplexity, open_scorer
from dispc.manifest import read_manifest
from dispc.masks import Masks
from dispc.model.text import load_tokens
from dispc.runtime import doctor
from dispc.runtime.providers import CPU, CUDA
from dispc.support.errors import ArtifactError, DataError

pytestmark = pytest.mark.usefixtures("own_cache")


def test_perplexity_is_that_of_its_definition(judged: Path) -> None:
    scorer = open_scorer(judged / "model")
    found = measure_perplexity(scorer, str(judged / "text.txt"), sequence_length=50)
    tokens = load_tokens(str(judged / "text.txt"), judged / "model")
    losses = []
    for at in range(0, len(tokens) - len(tokens) % 50, 50):
        ids = torch.from_numpy(tokens[at : at + 50].astype(np.int64))[None]
        losses.append(harness._dense_reference("llama")(input_ids=ids, labels=ids).loss.item())
    assert found.windows == len(losses) and found.tokens_scored == 49 * len(losses)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_torch_and_artifact_agree_within_a_thousandth(judged: Path) -> None:
    text = str(judged / "text.txt")
    masked = measure_perplexity(open_scorer(judged / "model", judged / "masks.safetensors"), text).perplexity
    compiled = measure_perplexity(open_scorer(judged / "out"), text).perplexity
    dense = measure_perplexity(open_scorer(judged / "model"), text).perplexity
    assert compiled == pytest.approx(masked, rel=1e-3)
    assert abs(dense - masked) > 0.01 * dense  # the masks matter, so agreement says something


@pytest.mark.parametrize("piece", [1, 7, 39, 40, 256])
def test_pieces_of_any_size_are_the_whole(judged: Path, piece: int) -> None:
    tokens = np.random.default_rng(piece).integers(0, 131, 40)
    scorer = ArtifactScorer(judged / "out", replace(CPU, chunk=piece))
    assert [len(logits) for logits in scorer.pieces(tokens)] == [len(part) for part in batched(tokens, piece)]
    expected = logits_of(open_scorer(judged / "model", judged / "masks.safetensors"), tokens)
    np.testing.assert_allclose(logits_of(scorer, tokens), expected, atol=2e-4)
    text = str(judged / "text.txt")
    found, whole = (
        measure_perplexity(scored, text, sequence_length=40, max_windows=3)
        for scored in (scorer, open_scorer(judged / "model", judged / "masks.safetensors"))
    )
    assert found.mean_nll == pytest.approx(whole.mean_nll, rel=1e-4)
    assert found.tokens_scored == whole.tokens_scored


def batched(tokens: Any, size: int) -> list[Any]:
    return [tokens[at : at + size] for at in range(0, len(tokens), size)]


def test_a_scorer_of_a_loaded_model_scores_with_that_model(judged: Path) -> None:
    model, text = harness._dense_reference("llama"), str(judged / "text.txt")
    scorer = TorchScorer.of(model, judged / "model", 40)
    assert scorer.model is model
    with pytest.raises(DataError, match="takes 2 to 40"):
        measure_perplexity(scorer, text, sequence_length=41)
    found = measure_perplexity(scorer, text)
    assert found.sequence_length == 40
    assert found == measure_perplexity(open_scorer(judged / "model"), text, sequence_length=40)


def test_the_command_reports_what_was_measured(judged: Path, tmp_path: Path) -> None:
    outcome = run(
        "eval",
        judged / "out",
        "--data",
        judged / "text.txt",
        "--sequence-length",
        40,
        "--max-windows",
        3,
        "--json",
        "--json-file",
        tmp_path / "report.json",
    )
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["perplexity"][0]["windows"] == 3
    assert "text.txt" in run("eval", judged / "out", "--data", judged / "text.txt", "--max-windows", 1).out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["out"], "nothing to measure"),
        (["out", "--data", "text.txt", "--masks", "masks.safetensors"], "masks are compiled in"),
        (["model", "--data", "text.txt", "--sequence-length", "500"], "takes 2 to 160"),
        (["model", "--data", "text.txt", "--sequence-length", "0"], "takes 2 to 160"),
        (["model", "--data", "none.txt"], "no such file"),
        (["model", "--data", "text.txt", "--data", "none.txt"], "no such file"),
        (["model", "--data", "text.txt", "--device", "gpu"], "choose cpu, cuda or cuda:N"),
        (["model", "--data", "text.txt", "--device", "cuda"], "torch sees no CUDA device"),
        (["out", "--data", "text.txt", "--device", "cuda"], "is for the CPU"),
        (["out", "--data", "text.txt", "--device", "cuda:1"], "runs on cpu or cuda"),
        (["out", "--data", "text.txt", "--record"], "--record"),
        (["model", "--masks", "masks.safetensors", "--tasks", "sea", "--record"], "--data FILE"),
        (["model", "--data", "text.txt", "--json-file", "/dev/null/report.json"], "/dev/null"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_measured(
    judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(evaluate, "measure_perplexity", Mock(side_effect=AssertionError("it was measured")))
    (tmp_path / "cache").mkdir()
    for source in ("text.txt", "none.txt"):  # what is read before a refusal is cached: that is no result
        if (judged / source).exists():
            load_tokens(str(judged / source), judged / "model"), load_tokens(str(judged / source), judged / "out")
    names = {"out", "model", "text.txt", "masks.safetensors", "none.txt"}
    assert_refused(tmp_path, "eval", *(judged / a if a in names else a for a in arguments), says=(says,))


def test_cuda_is_used_for_an_artifact_or_said_to_be_missing(judged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = replace(read_manifest(judged / "out"), target="onnx")
    monkeypatch.setattr(perplexity, "read_manifest", lambda path: manifest)
    opened = []
    monkeypatch.setattr(perplexity, "ArtifactScorer", lambda path, provider: opened.append(provider))
    monkeypatch.setattr(doctor, "cuda_problem", lambda: "libcudnn.so is missing")
    with pytest.raises(ArtifactError, match=r"libcudnn\.so is missing; .*--device cpu"):
        open_scorer(judged / "out", device="cuda")
    monkeypatch.setattr(doctor, "cuda_problem", lambda: None)
    open_scorer(judged / "out", device="cuda")
    open_scorer(judged / "out")
    assert opened == [CUDA, CPU]


@pytest.mark.parametrize("first", [True, False])
def test_of_two_providers_of_a_device_the_one_of_the_target_is_used(
    judged: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    other = replace(CPU, name="OtherExecutionProvider")
    rows = (CPU, other) if first else (other, CPU)
    monkeypatch.setattr(perplexity, "PROVIDERS", {provider.name: provider for provider in rows})
    monkeypatch.setattr(perplexity, "ArtifactScorer", lambda path, provider: provider)
    assert open_scorer(judged / "out") is CPU


def test_the_report_says_what_was_judged_and_where(judged: Path) -> None:
    masks = judged / "masks.safetensors"
    arguments = ("eval", judged / "model", "--masks", masks, "--data", judged / "text.txt", "--max-windows", 1)
    report = json.loads(run(*arguments, "--json").out)
    assert (report["masks"], report["dtype"], report["device"]) == (str(masks), "float32", "cpu")
    assert report["versions"]["torch"] == torch.__version__ and "dispc" in report["versions"]
    assert report["complete"]
    assert "under" in run(*arguments).out and "masks.safetensors" in run(*arguments).out.replace("\n", "")
    compiled = json.loads(run("eval", judged / "out", "--data", judged / "text.txt", "--max-windows", 1, "--json").out)
    assert (compiled["masks"], compiled["device"]) == (None, "CPUExecutionProvider")


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [(DataError("it is gone"), 2, "it is gone"), (KeyboardInterrupt(), 130, "report.json holds what was measured")],
    ids=["error", "interrupt"],
)
def test_what_was_measured_is_kept_when_a_later_part_fails(
    judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int, says: str
) -> None:
    measure, file = measure_perplexity, tmp_path / "report.json"

    def fails_on_the_second(scorer: Any, data: str, **options: Any) -> Any:
        if json.loads(file.read_text())["perplexity"]:
            raise failure
        return measure(scorer, data, **options)

    monkeypatch.setattr(evaluate, "measure_perplexity", fails_on_the_second)
    text = judged / "text.txt"
    outcome = run("eval", judged / "model", "--data", text, "--data", text, "--max-windows", 1, "--json-file", file)
    assert outcome.code == code and len(outcome.err.splitlines()) == 1 and says in outcome.err.replace("\n", "")
    report = json.loads(file.read_text())
    assert len(report["perplexity"]) == 1 and not report["complete"]


def test_a_perplexity_is_recorded_in_the_mask_file(judged: Path, tmp_path: Path) -> None:
    file = Path(shutil.copyfile(judged / "masks.safetensors", tmp_path / "masks.safetensors"))
    before = Masks.load(file)
    arguments = ("eval", judged / "model", "--masks", file, "--data", judged / "text.txt", "--sequence-length", 40)
    report = json.loads(run(*arguments, "--record", "--json").out)
    after = Masks.load(file)
    figure = f"{report['perplexity'][0]['perplexity']:.2f}"
    assert after.metadata == {**before.metadata, "perplexity": f"{figure} on text.txt, windows of 40"}
    assert after.sha256() == before.sha256()
    assert not list(tmp_path.glob("*.partial"))
    assert run(*arguments, "--record", "--max-windows", 2).code == 0
    assert Masks.load(file).metadata["perplexity"].endswith(" on text.txt, windows of 40, the first 2")


def test_a_report_does_not_replace_what_is_read(judged: Path, tmp_path: Path) -> None:
    for name in ("text.txt", "masks.safetensors"):
        shutil.copy(judged / name, tmp_path / name)
    arguments = ("eval", judged / "model", "--masks", tmp_path / "masks.safetensors", "--data", tmp_path / "text.txt")
    for path in (tmp_path / "." / "text.txt", tmp_path / "masks.safetensors", judged / "model" / "config.json"):
        assert_refused(path.parent, *arguments, "--json-file", path, says=(str(path), "is an input"))


def test_masks_beside_a_model_that_is_judged_dense_are_pointed_out(judged: Path, tmp_path: Path) -> None:
    model = shutil.copytree(judged / "model", tmp_path / "a[bold]model")
    arguments = ("eval", model, "--data", judged / "text.txt", "--max-windows", 1)
    assert run(*arguments).err == ""
    shutil.copy(judged / "masks.safetensors", model)
    outcome = run(*arguments)
    assert outcome.code == 0 and outcome.err.startswith("note: this is the dense model")
    assert f"--masks {model}/masks.safetensors " in outcome.err and len(outcome.err.splitlines()) == 1
    assert run(*arguments, "--masks", model / "masks.safetensors").err == ""
    assert run("eval", judged / "out", "--data", judged / "text.txt", "--max-windows", 1).err == ""


def test_logits_that_are_not_numbers_are_no_perplexity(judged: Path, tmp_path: Path) -> None:
    model = shutil.copytree(judged / "model", tmp_path / "model")
    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(state, model / "model.safetensors", {"format": "pt"})
    arguments = ("eval", model, "--data", judged / "text.txt", "--max-windows", 1)
    assert_refused(model, *arguments, says=("not numbers", str(judged / "text.txt")))


def test_a_perplexity_that_cannot_be_recorded_is_told(
    judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shutil.copy(judged / "masks.safetensors", tmp_path)
    arguments = ("eval", judged / "model", "--masks", file, "--data", judged / "text.txt", "--max-windows", 1)
    figure = json.loads(run(*arguments, "--json").out)["perplexity"][0]["perplexity"]
    monkeypatch.setattr(Masks, "save", Mock(side_effect=PermissionError(1, "Operation not permitted")))
    says = (str(file), "cannot be written (Operation not permitted)", f"{figure:.2f} on text.txt")
    assert_refused(tmp_path, *arguments, "--record", says=says)
