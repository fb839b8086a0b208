"""`dispc recover`: what it makes compiles, passes and is judged as it is; what it cannot do it says in one line."""

import json
import shutil
from pathlib import Path

import pytest
from command import assert_refused, run
from student import command_line, student, text

from dispc.learn.instant import instant_masks
from dispc.model.checkpoint import Checkpoint

pytestmark = [
    pytest.mark.extras,
    pytest.mark.xdist_group("learn"),  # one worker, so that the student is taught once
    pytest.mark.usefixtures("own_cache"),
]


def arguments(folder: Path, *more: str) -> list[str]:
    masks = folder / "m.safetensors"
    if not masks.exists():
        instant_masks(student(), "magnitude", 0.3).save(masks, Checkpoint(student()).config)
    short = dict(steps=8, batch_size=4, evaluate_every=4)
    return [*command_line("recover", masks=masks, output=folder / "out", **short), *more]


@pytest.mark.parametrize("more", [(), ("--lora", "2")], ids=str)
def test_what_it_makes_goes_through_compile_validate_and_eval(tmp_path: Path, more: tuple[str, ...]) -> None:
    outcome = run(*arguments(tmp_path, "--json", *more))
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["best"]["loss"] <= json.loads(outcome.out)["begin"]["loss"]
    made = tmp_path / "out"
    assert (made / "README.md").read_text().startswith("# student, pruned and recovered")
    assert (tmp_path / "out.recover" / "recovery.png").read_bytes().startswith(b"\x89PNG")
    outcome = run("compile", made, "--target", "onnx-cpu", "-o", tmp_path / "artifact")
    assert outcome.code == 0, outcome.err
    outcome = run("validate", tmp_path / "artifact", "--reference", made)
    assert outcome.code == 0, outcome.out
    outcome = run("eval", made, "--data", text("train.txt", 3000, 2), "--sequence-length", "32", "--max-windows", "2")
    assert outcome.code == 0, outcome.err
    before = (made / "model.safetensors").read_bytes()
    (made / "thesis.tex").touch()
    outcome = run(*arguments(tmp_path, "--force", *more))
    assert outcome.code == 2 and "thesis.tex" in outcome.err, outcome.err
    assert (made / "thesis.tex").exists() and (made / "model.safetensors").read_bytes() == before


def test_a_run_that_gains_nothing_says_so(tmp_path: Path) -> None:
    outcome = run(*arguments(tmp_path, "--learning-rate", "10", "--warm-up", "0"))
    assert outcome.code == 0
    assert "nothing was gained" in outcome.err


def test_what_is_there_is_never_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    for more in ((), ("--force",)):
        outcome = run(*arguments(tmp_path, *more))
        assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "out.recover").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--loss", "nonsense"), "distil, text, both"),
        (("--lora", "-1"), "lora is -1"),
        (("--minutes", "0"), "minutes is 0"),
        (("--learning-rate", "nan"), "learning_rate is nan"),
        (("--data", "nowhere.txt"), "no such file"),
        (("--teacher", "nowhere"), "no such model directory"),
        (("--device", "gpu"), "choose cpu, cuda or cuda:N"),
        (("--precision", "float8"), "float32, bfloat16"),
        (("--steps", "0"), "steps is 0"),
        (("--sequence-length", "1"), "sequence_length is 1"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, more: tuple[str, ...], says: str) -> None:
    (tmp_path / "cache").mkdir()
    line = arguments(tmp_path, *more)
    assert_refused(tmp_path, *line, says=(says,))


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
    other = shutil.copytree(student(), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    outcome = run("recover", other, *arguments(tmp_path)[2:])
    assert outcome.code == 2 and "belong to another model: num_hidden_layers" in outcome.err
