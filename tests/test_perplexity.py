"""Perplexity: the protocol against its definition, and the same figure from torch and from the artifact."""

import io
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import harness
import language
import numpy as np
import pytest
import tiny
import torch
from command import assert_refused, run

from dispc.compiler import CompileOptions, compile_model
from dispc.corpus import load_tokens
from dispc.errors import ArtifactError, DataError
from dispc.generate import load_tokenizer
from dispc.masks import Masks
from dispc.validate import evaluate, perplexity
from dispc.validate.perplexity import ArtifactScorer, TorchScorer, logits_of, measure_perplexity, open_scorer
from dispc.validate.zero_shot import score_continuation


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `masks.safetensors`, `out` compiled from both, and `text.txt`."""
    folder = tmp_path_factory.mktemp("perplexity")
    model = tiny.make_model("llama", folder / "model")
    language.make_tokenizer(model)
    config = harness.checkpoint("llama").config
    Masks.random(config, 0.4, 1).save(folder / "masks.safetensors", config)
    options = CompileOptions(
        model=model, masks=folder / "masks.safetensors", output=folder / "out", target="onnx-cpu", validate=False
    )
    compile_model(options)
    (folder / "text.txt").write_text(language.make_text(200, 4))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_perplexity_is_that_of_its_definition(place: Path) -> None:
    scorer = open_scorer(place / "model")
    found = measure_perplexity(scorer, str(place / "text.txt"), sequence_length=50)
    tokens = load_tokens(str(place / "text.txt"), place / "model")
    losses = []
    for at in range(0, len(tokens) - len(tokens) % 50, 50):
        ids = torch.from_numpy(tokens[at : at + 50].astype(np.int64))[None]
        losses.append(harness._dense_reference("llama")(input_ids=ids, labels=ids).loss.item())
    assert found.windows == len(losses) and found.tokens_scored == 49 * len(losses)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_torch_and_artifact_agree_within_a_thousandth(place: Path) -> None:
    text = str(place / "text.txt")
    masked = measure_perplexity(open_scorer(place / "model", place / "masks.safetensors"), text).perplexity
    compiled = measure_perplexity(open_scorer(place / "out"), text).perplexity
    dense = measure_perplexity(open_scorer(place / "model"), text).perplexity
    assert compiled == pytest.approx(masked, rel=1e-3)
    assert abs(dense - masked) > 0.01 * dense  # the masks matter, so agreement says something


@pytest.mark.parametrize("piece", [1, 7, 39, 40, 256])
def test_pieces_of_any_size_are_the_whole(place: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(perplexity, "PIECE", piece)
    tokens = np.random.default_rng(piece).integers(0, 131, 40)
    scorer = ArtifactScorer(place / "out")
    assert [len(logits) for logits in scorer.pieces(tokens)] == [len(part) for part in batched(tokens, piece)]
    expected = logits_of(open_scorer(place / "model", place / "masks.safetensors"), tokens)
    np.testing.assert_allclose(logits_of(scorer, tokens), expected, atol=2e-4)
    text = str(place / "text.txt")
    found, whole = (
        measure_perplexity(open_scorer(place / what, masks), text, sequence_length=40, max_windows=3)
        for what, masks in (("out", None), ("model", place / "masks.safetensors"))
    )
    assert found.mean_nll == pytest.approx(whole.mean_nll, rel=1e-4)
    assert found.tokens_scored == whole.tokens_scored


def batched(tokens: Any, size: int) -> list[Any]:
    return [tokens[at : at + size] for at in range(0, len(tokens), size)]


def test_a_scorer_of_a_loaded_model_scores_with_that_model(place: Path) -> None:
    model, text = harness._dense_reference("llama"), str(place / "text.txt")
    scorer = TorchScorer.of(model, place / "model", 40)
    assert scorer.model is model
    with pytest.raises(DataError, match="takes 2 to 40"):
        measure_perplexity(scorer, text, sequence_length=41)
    found = measure_perplexity(scorer, text)
    assert found.sequence_length == 40
    assert found == measure_perplexity(open_scorer(place / "model"), text, sequence_length=40)


def test_a_continuation_is_scored_behind_its_context_alone(place: Path) -> None:
    scorer = open_scorer(place / "model")
    tokens = [5, 9, 20, 31, 44]
    log_p = torch.log_softmax(torch.from_numpy(logits_of(scorer, np.array(tokens))), -1)
    expected = sum(float(log_p[at - 1, tokens[at]]) for at in (3, 4))
    found, greedy = score_continuation(scorer, tokens[:3], tokens[3:])
    assert found == pytest.approx(expected, abs=1e-4)
    assert not greedy
    best = int(log_p[2].argmax())
    assert score_continuation(scorer, tokens[:3], [best])[1]
    long = np.random.default_rng(0).integers(0, 131, 400).tolist()  # longer than the model's 160 positions
    cut = score_continuation(scorer, long[-161:-2], long[-2:])
    assert score_continuation(scorer, long[:-2], long[-2:]) == pytest.approx(cut)


def test_the_command_reports_what_was_measured(place: Path, tmp_path: Path) -> None:
    outcome = run(
        "eval", place / "out", "--data", place / "text.txt", "--sequence-length", 40, "--max-windows", 3,
        "--json", "--json-file", tmp_path / "report.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["perplexity"][0]["windows"] == 3
    assert "text.txt" in run("eval", place / "out", "--data", place / "text.txt", "--max-windows", 1).out


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
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(evaluate, "measure_perplexity", Mock(side_effect=AssertionError("it was measured")))
    (tmp_path / "cache").mkdir()
    for source in ("text.txt", "none.txt"):  # what is read before a refusal is cached: that is no result
        if (place / source).exists():
            load_tokens(str(place / source), place / "model"), load_tokens(str(place / source), place / "out")
    names = {"out", "model", "text.txt", "masks.safetensors", "none.txt"}
    assert_refused(tmp_path, "eval", *(place / a if a in names else a for a in arguments), says=(says,))


def test_cuda_is_used_for_an_artifact_or_said_to_be_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((place / "out" / "dispc.json").read_text())
    monkeypatch.setattr(perplexity, "read_manifest", lambda path: manifest | {"target": "onnx"})
    opened = []
    monkeypatch.setattr(perplexity, "ArtifactScorer", lambda path, provider: opened.append(provider))
    monkeypatch.setattr(perplexity, "cuda_problem", lambda: "libcudnn.so is missing")
    with pytest.raises(ArtifactError, match=r"libcudnn\.so is missing; .*--device cpu"):
        open_scorer(place / "out", device="cuda")
    monkeypatch.setattr(perplexity, "cuda_problem", lambda: None)
    open_scorer(place / "out", device="cuda")
    open_scorer(place / "out")
    assert opened == ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_the_report_says_what_was_judged_and_where(place: Path) -> None:
    masks = place / "masks.safetensors"
    arguments = ("eval", place / "model", "--masks", masks, "--data", place / "text.txt", "--max-windows", 1)
    report = json.loads(run(*arguments, "--json").out)
    assert (report["masks"], report["dtype"], report["device"]) == (str(masks), "float32", "cpu")
    assert report["versions"]["torch"] == torch.__version__ and "dispc" in report["versions"]
    assert report["complete"]
    assert "under" in run(*arguments).out and "masks.safetensors" in run(*arguments).out.replace("\n", "")
    compiled = json.loads(run("eval", place / "out", "--data", place / "text.txt", "--max-windows", 1, "--json").out)
    assert (compiled["masks"], compiled["device"]) == (None, "CPUExecutionProvider")


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [(DataError("it is gone"), 2, "it is gone"), (KeyboardInterrupt(), 130, "report.json holds what was measured")],
    ids=["error", "interrupt"],
)
def test_what_was_measured_is_kept_when_a_later_part_fails(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int, says: str
) -> None:
    measure, file = measure_perplexity, tmp_path / "report.json"

    def fails_on_the_second(scorer: Any, data: str, **options: Any) -> Any:
        if json.loads(file.read_text())["perplexity"]:
            raise failure
        return measure(scorer, data, **options)

    monkeypatch.setattr(evaluate, "measure_perplexity", fails_on_the_second)
    text = place / "text.txt"
    outcome = run("eval", place / "model", "--data", text, "--data", text, "--max-windows", 1, "--json-file", file)
    assert outcome.code == code and len(outcome.err.splitlines()) == 1 and says in outcome.err.replace("\n", "")
    report = json.loads(file.read_text())
    assert len(report["perplexity"]) == 1 and not report["complete"]


def test_a_perplexity_is_recorded_in_the_mask_file(place: Path, tmp_path: Path) -> None:
    file = Path(shutil.copyfile(place / "masks.safetensors", tmp_path / "masks.safetensors"))
    before = Masks.load(file)
    arguments = ("eval", place / "model", "--masks", file, "--data", place / "text.txt", "--sequence-length", 40)
    report = json.loads(run(*arguments, "--record", "--json").out)
    after = Masks.load(file)
    figure = f"{report['perplexity'][0]['perplexity']:.2f}"
    assert after.metadata == {**before.metadata, "perplexity": f"{figure} on text.txt, windows of 40"}
    assert after.sha256() == before.sha256()
    assert not list(tmp_path.glob("*.partial"))
    assert run(*arguments, "--record", "--max-windows", 2).code == 0
    assert Masks.load(file).metadata["perplexity"].endswith(" on text.txt, windows of 40, the first 2")


@pytest.mark.extras
def test_zero_shot_tasks_of_ones_own_run_offline_on_torch_and_artifact(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    items = [
        {"question": "the sea is", "choices": [" salt", " dry"], "answer": 0},
        {"question": "the sea is old and", "choices": [" up", " wide"], "answer": 1},
        {"question": "deep blue", "choices": [" sea", " tea", " bee"], "answer": 2},
    ]
    data = tmp_path / "sea.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "sea.yaml").write_text(
        "task: sea\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    found = {}
    for name, masks in (("out", []), ("model", ["--masks", place / "masks.safetensors"])):
        outcome = run("eval", place / name, *masks, "--tasks", "sea", "--include", tmp_path, "--json")
        assert outcome.code == 0, outcome.err
        found[name] = json.loads(outcome.out)["tasks"]["sea"]
    scorer = open_scorer(place / "out")
    right = right_by_length = 0
    for item in items:
        scores = [
            score_continuation(scorer, ids_of(place, item["question"]), ids_of(place, choice))[0]
            for choice in item["choices"]
        ]
        right += int(np.argmax(scores)) == item["answer"]
        lengths = [len(choice) for choice in item["choices"]]
        right_by_length += int(np.argmax(np.array(scores) / lengths)) == item["answer"]
    assert found["out"] == found["model"]
    assert found["out"]["items"] == 3 and found["out"]["metric"] == "acc_norm"
    assert found["out"]["metrics"] == pytest.approx({"acc": right / 3, "acc_norm": right_by_length / 3})
    assert found["out"]["value"] == found["out"]["metrics"]["acc_norm"]
    table = run("eval", place / "out", "--tasks", "sea", "--include", tmp_path).out
    assert f"acc {100 * right / 3:.1f} %" in table and "acc_norm" in table


def ids_of(place: Path, text: str) -> list[int]:
    return list(load_tokenizer(place / "model").encode(text, add_special_tokens=False))


@pytest.mark.extras
def test_groups_are_reported_by_their_tasks_and_what_was_measured_is_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    for name in ("sea", "lake"):
        write_task(tmp_path, name)
    (tmp_path / "water.yaml").write_text("group: water\ntask: [sea, lake]\n")
    arguments = ("eval", place / "out", "--include", tmp_path, "--json-file", tmp_path / "report.json", "--tasks")
    assert run(*arguments, "water").code == 0
    tasks = json.loads((tmp_path / "report.json").read_text())["tasks"]
    assert {name: facts["items"] for name, facts in tasks.items()} == {"sea": 1, "lake": 1}
    measure = evaluate.measure_task

    def fails_at_the_lake(scorer: Any, task: str, **options: Any) -> Any:
        if task == "lake":
            raise DataError("it is frozen")
        return measure(scorer, task, **options)

    monkeypatch.setattr(evaluate, "measure_task", fails_at_the_lake)
    assert "it is frozen" in run(*arguments, "sea,lake").err
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["tasks"]) == ["sea"] and not report["complete"]


@pytest.mark.extras
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"output_type": "generate_until"}, "is a task of kind generate_until; choose tasks that are judged by"),
        ({"output_type": "loglikelihood_rolling"}, "is a task of kind loglikelihood_rolling"),
        ({"metric_list": "[{metric: brier_score}]"}, "reports none of acc_norm, acc, exact_match"),
    ],
    ids=str,
)
def test_tasks_without_a_figure_are_refused_before_anything_is_measured(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], says: str
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(evaluate, "open_scorer", Mock(side_effect=AssertionError("a model was loaded")))
    write_task(tmp_path, "sea")
    write_task(tmp_path, "lake", **changes)
    outcome = run("eval", place / "out", "--tasks", "sea,lake", "--include", tmp_path)
    assert outcome.code == 2 and f"--tasks lake: {says}" in outcome.err.replace("\n", " ")


def test_an_answer_that_has_no_token_or_does_not_fit_is_refused(place: Path) -> None:
    scorer = open_scorer(place / "out")
    assert np.isfinite(score_continuation(scorer, [1], [2] * 160)[0])
    for length in (0, 161):
        with pytest.raises(DataError, match=f"an answer of {length} tokens: .* takes 1 to 160"):
            score_continuation(scorer, [1], [2] * length)


def test_a_report_does_not_replace_what_is_read(place: Path, tmp_path: Path) -> None:
    for name in ("text.txt", "masks.safetensors"):
        shutil.copy(place / name, tmp_path / name)
    arguments = ("eval", place / "model", "--masks", tmp_path / "masks.safetensors", "--data", tmp_path / "text.txt")
    for name in ("text.txt", "masks.safetensors"):
        assert_refused(tmp_path, *arguments, "--json-file", tmp_path / "." / name, says=("is read as an input",))


def test_masks_beside_a_model_that_is_judged_dense_are_pointed_out(place: Path, tmp_path: Path) -> None:
    model = shutil.copytree(place / "model", tmp_path / "model")
    arguments = ("eval", model, "--data", place / "text.txt", "--max-windows", 1)
    assert run(*arguments).err == ""
    shutil.copy(place / "masks.safetensors", model)
    outcome = run(*arguments)
    assert outcome.code == 0 and "judged is the dense model" in outcome.err.replace("\n", " ")
    assert run(*arguments, "--masks", model / "masks.safetensors").err == ""
    assert run("eval", place / "out", "--data", place / "text.txt", "--max-windows", 1).err == ""


def write_task(folder: Path, name: str, **changes: str) -> None:
    """A multiple-choice task of one item, and its data."""
    (folder / f"{name}.jsonl").write_text(GOOD_ITEM + "\n")
    definition = {
        "task": name, "dataset_path": "json", "dataset_kwargs": f"{{data_files: {{test: {folder}/{name}.jsonl}}}}",
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "'{{question}}'",
        "doc_to_choice": "'{{choices}}'", "doc_to_target": "answer", "metric_list": "[{metric: acc}]",
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text("".join(f"{key}: {value}\n" for key, value in (definition | changes).items()))


GOOD_ITEM = '{"question": "the sea is", "choices": [" salt", " dry"], "answer": 0}'


@pytest.mark.extras
@pytest.mark.parametrize(
    ("items", "says"),
    [
        ("{broken", "the data of sea cannot be had"),
        (GOOD_ITEM + '\n{"asked": "x", "choices": [" a", " b"], "answer": 0}', "do not fit"),
    ],
)
def test_items_that_are_nonsense_are_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: str, says: str
) -> None:
    pytest.importorskip("lm_eval")
    log = io.StringIO()  # that of `datasets` would be the stream of whichever test imported it first
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [logging.StreamHandler(log)])
    (tmp_path / "sea.jsonl").write_text(items + "\n")
    (tmp_path / "sea.yaml").write_text(
        f"task: sea\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/sea.jsonl\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{question.lower()}}"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
    )
    outcome = run("eval", place / "out", "--tasks", " sea ", "--include", tmp_path)
    assert outcome.code == 2 and says in outcome.err and "Traceback" not in outcome.err
    assert log.getvalue() == ""


@pytest.mark.extras
@pytest.mark.parametrize("reason", ["unknown", "no data", "no directory", "no package"])
def test_tasks_that_cannot_be_had_are_refused_before_anything_is_measured(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(evaluate, "open_scorer", Mock(side_effect=AssertionError("a model was loaded")))
    (tmp_path / "sea.yaml").write_text(
        f"task: sea\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/none.jsonl\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{question}}"\ndoc_to_target: answer\n'
    )
    include, says = tmp_path, {"unknown": "knows no such task", "no data": "the data of sea cannot be had"}.get(reason)
    if reason == "no directory":
        include, says = tmp_path / "nowhere", "no such directory"
    if reason == "no package":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        says = "pip install 'dispc[eval]'"
    task = "nonsense" if reason == "unknown" else "sea"
    arguments = ("eval", place / "out", "--data", place / "text.txt", "--tasks", task, "--include", include)
    assert_refused(tmp_path, *arguments, says=(str(says),))
