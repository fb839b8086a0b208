"""Zero-shot tasks through lm-evaluation-harness: offline, on torch and artifact alike, refused before the work."""

import io
import json
import logging
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from command import assert_refused, run

from dispc.evaluate import evaluate
from dispc.evaluate.perplexity import logits_of, open_scorer
from dispc.evaluate.zero_shot import score_continuation
from dispc.model.tokenizer import load_tokenizer
from dispc.support.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_continuation_is_scored_behind_its_context_alone(judged: Path) -> None:
    scorer = open_scorer(judged / "model")
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


@pytest.mark.extras
def test_zero_shot_tasks_of_ones_own_run_offline_on_torch_and_artifact(judged: Path, tmp_path: Path) -> None:
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
    for name, masks in (("out", []), ("model", ["--masks", judged / "masks.safetensors"])):
        outcome = run("eval", judged / name, *masks, "--tasks", "sea", "--include", tmp_path, "--json")
        assert outcome.code == 0, outcome.err
        found[name] = json.loads(outcome.out)["tasks"]["sea"]
    scorer = open_scorer(judged / "out")
    right = right_by_length = 0
    for item in items:
        scores = [
            score_continuation(scorer, ids_of(judged, item["question"]), ids_of(judged, choice))[0]
            for choice in item["choices"]
        ]
        right += int(np.argmax(scores)) == item["answer"]
        lengths = [len(choice) for choice in item["choices"]]
        right_by_length += int(np.argmax(np.array(scores) / lengths)) == item["answer"]
    assert found["out"] == found["model"]
    assert found["out"]["items"] == 3 and found["out"]["metric"] == "acc_norm"
    assert found["out"]["metrics"] == pytest.approx({"acc": right / 3, "acc_norm": right_by_length / 3})
    assert found["out"]["value"] == found["out"]["metrics"]["acc_norm"]
    table = run("eval", judged / "out", "--tasks", "sea", "--include", tmp_path).out
    assert f"acc {100 * right / 3:.1f} %" in table and "acc_norm" in table


def ids_of(judged: Path, text: str) -> list[int]:
    return list(load_tokenizer(judged / "model").encode(text, add_special_tokens=False))


@pytest.mark.extras
def test_groups_are_reported_by_their_tasks_and_what_was_measured_is_kept(
    judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    tasks_folder, file = tmp_path / "tasks", tmp_path / "report.json"
    tasks_folder.mkdir()
    for name in ("sea", "lake"):
        write_task(tasks_folder, name)
    (tasks_folder / "water.yaml").write_text("group: water\ntask: [sea, lake]\n")
    line = ("eval", judged / "out", "--include", tasks_folder)
    assert_refused(
        tasks_folder, *line, "--json-file", tasks_folder / "sea.yaml", "--tasks", "sea", says=("is an input",)
    )
    arguments = (*line, "--json-file", file, "--tasks")
    assert run(*arguments, "water").code == 0
    tasks = json.loads(file.read_text())["tasks"]
    assert {name: facts["items"] for name, facts in tasks.items()} == {"sea": 1, "lake": 1}
    measure = evaluate.measure_task

    def fails_at_the_lake(scorer: Any, task: str, **options: Any) -> Any:
        if task == "lake":
            raise DataError("it is frozen")
        return measure(scorer, task, **options)

    monkeypatch.setattr(evaluate, "measure_task", fails_at_the_lake)
    assert "it is frozen" in run(*arguments, "sea,lake").err
    report = json.loads(file.read_text())
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
    judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], says: str
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(evaluate, "open_scorer", Mock(side_effect=AssertionError("a model was loaded")))
    write_task(tmp_path, "sea")
    write_task(tmp_path, "lake", **changes)
    outcome = run("eval", judged / "out", "--tasks", "sea,lake", "--include", tmp_path)
    assert outcome.code == 2 and f"--tasks lake: {says}" in outcome.err.replace("\n", " ")


def test_an_answer_that_has_no_token_or_does_not_fit_is_refused(judged: Path) -> None:
    scorer = open_scorer(judged / "out")
    assert np.isfinite(score_continuation(scorer, [1], [2] * 160)[0])
    for length in (0, 161):
        with pytest.raises(DataError, match=f"an answer of {length} tokens: .* takes 1 to 160"):
            score_continuation(scorer, [1], [2] * length)


def write_task(folder: Path, name: str, **changes: str) -> None:
    """A multiple-choice task of one item, and its data."""
    (folder / f"{name}.jsonl").write_text(GOOD_ITEM + "\n")
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": f"{{data_files: {{test: {folder}/{name}.jsonl}}}}",
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "'{{question}}'",
        "doc_to_choice": "'{{choices}}'",
        "doc_to_target": "answer",
        "metric_list": "[{metric: acc}]",
    }
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
    judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: str, says: str
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
    outcome = run("eval", judged / "out", "--tasks", " sea ", "--include", tmp_path)
    assert outcome.code == 2 and says in outcome.err and "Traceback" not in outcome.err
    assert log.getvalue() == ""


@pytest.mark.extras
@pytest.mark.parametrize("reason", ["unknown", "no data", "no directory", "no package", "pipe"])
def test_tasks_that_cannot_be_had_are_refused_before_anything_is_measured(
    judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
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
    if reason == "pipe":
        os.mkfifo(tmp_path / "lake.yaml")
        says = "lake.yaml: is no regular file"
    if reason == "no package":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        says = "pip install 'dispc[eval]'"
    task = "nonsense" if reason == "unknown" else "sea"
    arguments = ("eval", judged / "out", "--data", judged / "text.txt", "--tasks", task, "--include", include)
    assert_refused(tmp_path, *arguments, says=(str(says),))
