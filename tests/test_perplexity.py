"""Perplexity: the protocol against its definition, and the same figure from torch and from the artifact."""

import json
import math
from pathlib import Path

import harness
import language
import numpy as np
import pytest
import tiny
import torch
from command import assert_refused, run

from dispc.compiler import CompileOptions, compile_model
from dispc.corpus import load_tokens
from dispc.errors import DataError
from dispc.generate import load_tokenizer
from dispc.masks import Masks
from dispc.validate.perplexity import TorchScorer, measure_perplexity, open_scorer
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
    log_p = torch.log_softmax(torch.from_numpy(scorer.logits(np.array(tokens))), -1)
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
        (["model", "--data", "none.txt"], "no such file"),
    ],
    ids=str,
)
def test_bad_input_is_refused(place: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    names = {"out", "model", "text.txt", "masks.safetensors", "none.txt"}
    assert_refused(tmp_path, "eval", *(place / a if a in names else a for a in arguments), says=(says,))


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
        "metric_list:\n  - metric: acc\n"
    )
    found = {}
    for name, masks in (("out", []), ("model", ["--masks", place / "masks.safetensors"])):
        outcome = run("eval", place / name, *masks, "--tasks", "sea", "--include", tmp_path, "--json")
        assert outcome.code == 0, outcome.err
        found[name] = json.loads(outcome.out)["tasks"]["sea"]
    scorer = open_scorer(place / "out")
    right = 0
    for item in items:
        scores = [
            score_continuation(scorer, ids_of(place, item["question"]), ids_of(place, choice))[0]
            for choice in item["choices"]
        ]
        right += int(np.argmax(scores)) == item["answer"]
    assert found["out"] == found["model"]
    assert found["out"]["items"] == 3 and found["out"]["value"] == pytest.approx(right / 3)


def ids_of(place: Path, text: str) -> list[int]:
    return list(load_tokenizer(place / "model").encode(text, add_special_tokens=False))


@pytest.mark.extras
def test_an_unknown_task_is_refused(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    assert_refused(tmp_path, "eval", place / "out", "--tasks", "nonsense", says=("knows no such task",))
