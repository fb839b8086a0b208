"""The scripts that write docs/results.md: the text, the tasks, and a page that holds what the cells hold."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command
import learned_masks
import pytest
import results_page
from common import Run
from language import make_student, make_tokenizer
from learned_masks import DENSE, Cell, grid
from learning_text import articles, known_words
from results_page import write_page
from zero_shot_tasks import TASKS, prepare

from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint

WIKITEXT = " \n = A = \n \n One , two . \n An <unk> line . \n = = B = = \n \n Three @-@ four . \n \n = C = \n Five . \n"


def test_articles_begin_at_their_titles_and_lose_the_lines_with_unknown_words() -> None:
    first, second = articles(WIKITEXT)
    assert first.startswith(" = A = \n") and second == " = C = \n Five . \n"
    assert known_words(first) == first.replace(" An <unk> line . \n", "")


def test_every_second_article_of_the_text_is_detokenised(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from learning_text import main

    page = " = A = \n" + " One , two @-@ three . \n" * 30
    (tmp_path / "wiki").write_text(page * 2)
    main([tmp_path / "wiki"], tmp_path / "out" / "text")
    text = (tmp_path / "out" / "text").read_text()
    first, second = text[: len(page)], text[len(page) :]
    assert "One , two @-@ three ." in first and second and "@-@" not in second and "One, two-three." in second


def data_files(folder: Path) -> None:
    """One item of each task, in the form of the published files."""
    arc = {"query": "Question: What is salt?", "choices": ["the sea", "a tower"], "gold": 0}
    files: dict[str, Any] = {
        "piqa_valid.jsonl": {"goal": "To sail", "sol1": "take a ship", "sol2": "take a tower"},
        "foundry_arc_easy.jsonl": arc,
        "foundry_arc_challenge.jsonl": arc | {"gold": 1},
        "foundry_winogrande.jsonl": {"context_options": ["the sea", "a ship"], "continuation": "is deep", "gold": 1},
    }
    for name, row in files.items():
        (folder / name).write_text(json.dumps(row) + "\n")
    (folder / "piqa_valid-labels.lst").write_text("1\n")
    (folder / "hellaswag_val_full.txt").write_text("the sea is\n2\na tower\na ship\ndeep\nsalt\n")


def run_here(words: Sequence[str | Path]) -> Run:
    """`common.run` without a new process, which would import lm-evaluation-harness again each time."""
    outcome = command.run(*words[1:])
    assert outcome.code == 0, outcome.err
    return Run(seconds=0.0, peak_bytes=0, user_seconds=0.0, system_seconds=0.0, output=outcome.out)


def test_the_five_tasks_are_measured_and_shown_beside_the_perplexities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way on a model of seconds: masks, cells, page."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(learned_masks, "run", run_here)
    model = make_student("llama", tmp_path / "model", steps=1)
    make_tokenizer(model)
    config = Checkpoint(model).config
    masks, tasks, results = (tmp_path / name for name in ("masks", "tasks", "results"))
    masks.mkdir()
    Masks.random(config, 0.3, 1).save(masks / "disp-llm-30-0.safetensors", config)
    file = masks / "disp-llm-30-0.safetensors"
    facts = {"steps": "2", "sequence_length": "8", "pruning_ratio": "0.3", "learning_rate": "0.002", "decay": "true"}
    facts |= {"precision": "bfloat16"}
    loaded = Masks.load(file)
    Masks(**{**loaded.__dict__, "metadata": facts | {"data": "text", "offset": "5.0"}}).save(file, config)
    (tmp_path / "text").write_text("the sea is salt and deep blue " * 20)
    data_files(tmp_path)
    assert prepare(tmp_path, tasks) == dict.fromkeys(TASKS, 1)
    for _ in range(2):  # the second time there is nothing left to do
        learned_masks.judge(model, masks, tmp_path / "text", window=16, max_windows=2, results=results, only="")
        learned_masks.zero_shot(model, masks, tasks, limit=1, results=results, only="DISP-LLM")
    compiled = tmp_path / "compiled"
    learned_masks.judge(
        model, masks, tmp_path / "text", window=16, max_windows=2, results=compiled, only="", compiled=True
    )
    learned_masks.zero_shot(model, masks, tasks, limit=1, results=compiled, only="DISP-LLM", compiled=True)
    cells, artifacts = (
        [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))] for folder in (results, compiled)
    )
    for cell, artifact in zip(cells, artifacts, strict=True):
        (torch,), (runtime,) = cell["perplexities"], artifact["perplexities"]
        assert runtime["perplexity"] == pytest.approx(torch["perplexity"], rel=1e-3)
        (tasks_in_torch,), (tasks_compiled,) = cell["zero_shot"], artifact["zero_shot"]
        assert tasks_in_torch["tasks"] == tasks_compiled["tasks"] and len(tasks_in_torch["tasks"]) == 5
        for measured, name in ((torch, "torch"), (runtime, "onnxruntime"), (tasks_compiled, "onnxruntime")):
            assert measured["runtime"] == name and measured["environment"]["python"]
    assert [(cell["method"], cell["model"]) for cell in cells] == [("dense", "model"), ("DISP-LLM", "model")]
    assert "--decay" in cells[1]["command"] and "--offset 5.0" in cells[1]["command"] and cells[1]["tokens"] == 16
    write_page(cells, list(learned_masks.METHODS), tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    for cell in cells:
        assert f"{cell['perplexities'][0]['perplexity']:.2f}" in page
    assert "arc_challenge" in page and "hellaswag" in page and "| random | not run |" in page
    assert "--data text --sequence-length 16 --max-windows 2`; judged was the torch reference." in page
    Masks.random(config, 0.3, 2).with_metadata(Masks.load(file).metadata).save(file, config)
    learned_masks.judge(model, masks, tmp_path / "text", window=16, max_windows=2, results=results, only="")
    again = json.loads((results / "disp-llm-30-0.json").read_text())  # other masks: nothing of the old ones is left
    assert len(again["perplexities"]) == 1 and not again["zero_shot"]
    assert again["perplexities"][0]["perplexity"] != cells[1]["perplexities"][0]["perplexity"]
    for other in ("lost masks", "another model"):  # a cell without its masks, or of a model with other weights
        if other == "lost masks":
            (results / file.name).unlink()
        else:
            make_student("llama", model, steps=2)
        fresh = learned_masks.read_record(results, Cell("DISP-LLM", 30), file, model)
        assert not fresh["perplexities"], other
    assert not learned_masks.read_record(results, DENSE, None, model)["perplexities"]


def test_the_page_in_the_repository_is_that_of_its_cells(tmp_path: Path) -> None:
    cells = [json.loads(path.read_text()) for path in sorted(learned_masks.RESULTS.glob("*.json"))]
    write_page(cells, list(learned_masks.METHODS), tmp_path / "page.md", results_page.RECOVERY)
    assert (tmp_path / "page.md").read_text() == results_page.PAGE.read_text()


def test_the_page_tells_seeds_and_ways_of_measuring_apart(tmp_path: Path) -> None:
    def cell(seed: int, perplexity: float, windows: int = 2) -> dict[str, Any]:
        text = {"data": "t", "windows": windows, "sequence_length": 8, "perplexity": perplexity}
        return {"method": "DISP-LLM", "ratio": 50, "seed": seed, "perplexities": [text], "zero_shot": []}

    write_page([cell(1, 12.0), cell(0, 10.0), cell(2, 99.0, windows=3)], list(learned_masks.METHODS), tmp_path / "p.md")
    page = (tmp_path / "p.md").read_text()
    assert "at 50 %: 10.00 (seed 0), 12.00 (seed 1); mean 11.00, standard deviation 1.41." in page
    assert page.index("2 windows") < page.index("| DISP-LLM | 10.00 |") < page.index("3 windows")


def test_the_grid_is_every_method_at_every_ratio_and_names_are_read_back() -> None:
    cells = grid([20, 50], seeds=3)
    assert len(cells) == len(set(cells)) == 2 * len(learned_masks.METHODS) + 2
    assert [Cell.of(Path(f"{cell.name}.safetensors")) for cell in cells] == cells
    assert DENSE not in cells
