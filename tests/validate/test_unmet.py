"""What random prompts do not meet: rows of tables, tokens behind a sliding window, and the files beside the graph."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import harness
import onnx_ir as ir
import pytest
import tiny
from artifacts import artifact, failed, judged

from dispc.compiler import CompileOptions, compile_model
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.plan import Quantisation
from dispc.validate import check
from dispc.validate.checks.static import COMPANIONS

TOKENS, PLACES = "model.embed_tokens.weight", "model.decoder.embed_positions.weight"
WINDOW = "behind the sliding window"


def spoil_rows(name: str, rows: slice, value: float = 7.0) -> faults.Fault:
    def spoil(model: ir.Model) -> None:
        values = faults.initializer(model, name)
        values[rows] = value
        faults.replace(model, name, values)

    return spoil


@pytest.mark.parametrize(
    ("variant", "name", "rows"),
    [("llama", TOKENS, slice(101, 102)), ("opt", PLACES, slice(92, 93)), ("opt", PLACES, slice(-1, None))],
)
def test_one_wrong_row_of_a_table_is_found(variant: str, name: str, rows: slice, tmp_path: Path) -> None:
    broken = faults.plant(spoil_rows(name, rows), artifact(variant), tmp_path / "broken")
    assert "embeddings" in failed(judged(broken, variant))


@pytest.mark.parametrize(
    ("variant", "target", "options"),
    [
        ("llama", "onnx-cuda", {"dtype": "float16"}),
        ("opt", "onnx-cuda", {"dtype": "bfloat16"}),
        ("opt", "onnx", {"dtype": "float16"}),
        (
            "phi",
            "onnx-cpu",
            {"quantisation": Quantisation(bits=4, block_size=16, symmetric=False, head=False, embedding=True)},
        ),
        (
            "phi",
            "onnx-cpu",
            {"quantisation": Quantisation(bits=8, block_size=16, symmetric=True, head=True, embedding=True)},
        ),
    ],
    ids=str,
)
def test_embeddings_of_every_kind_are_compared(variant: str, target: str, options: dict[str, Any]) -> None:
    report = judged(artifact(variant, target, **options), variant, device="cpu")
    found = next(check for check in report.checks if check.name == "embeddings")
    assert found.status == "passed" and "131 tokens" in found.detail


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A model whose window of so many tokens is longer than what other scenarios feed."""
    folder = tmp_path_factory.mktemp("windowed")

    def make(window: int) -> Path:
        model = folder / str(window)
        if not model.exists():
            tiny.make_model("mistral-window", model)
            config = json.loads((model / "config.json").read_text()) | {"sliding_window": window}
            (model / "config.json").write_text(json.dumps(config))
            checked = Checkpoint(model).config
            Masks.random(checked, 0.5, 4).save(model / "masks.safetensors", checked)
        return model

    return make


@pytest.mark.parametrize(
    "options", [{"target": "onnx"}, {"target": "onnx-cpu"}, {"target": "onnx-cpu", "padding": "left"}], ids=str
)
def test_a_window_of_another_length_is_found(
    windowed: Callable[[int], Path], options: dict[str, str], tmp_path: Path
) -> None:
    for window in (80, 100):
        made = CompileOptions(model=windowed(window), output=tmp_path / str(window), validate=False, **options)  # type: ignore[arg-type]
        compile_model(made)
    assert check(tmp_path / "80", windowed(80)).passed
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(tmp_path / "100" / name, tmp_path / "80" / name)
    report = check(tmp_path / "80", windowed(80))
    assert WINDOW in failed(report) <= {WINDOW, "positions near the limit", "KL divergence", "top-1 tokens"}


def test_a_window_that_nothing_slides_out_of_is_skipped(windowed: Callable[[int], Path], tmp_path: Path) -> None:
    made = CompileOptions(model=windowed(150), output=tmp_path / "out", target="onnx-cpu", validate=False)
    compile_model(made)
    found = next(each for each in check(tmp_path / "out", windowed(150)).checks if each.name == WINDOW)
    assert found.status == "skipped" and "none slides out" in found.detail


def edit_json(name: str, *keys: str, value: Any) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        content = json.loads((out / name).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (out / name).write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda out: (out / "generation_config.json").unlink(), "generation_config.json is missing"),
        (lambda out: (out / "config.json").write_text("{}"), "config.json differs from the reference"),
        (lambda out: (out / "genai_config.json").unlink(), "genai_config.json cannot be read"),
        (lambda out: (out / "genai_config.json").write_text('{"model": 3}'), "genai_config.json cannot be read"),
        (edit_json("dispc.json", "stop_tokens", value=[77]), r"stop_tokens \[77\], the reference has"),
        (edit_json("genai_config.json", "model", "eos_token_id", value=[77]), r"eos_token_id \[77\]"),
        (edit_json("genai_config.json", "model", "context_length", value=9999), "context_length 9999"),
        (edit_json("genai_config.json", "model", "decoder", "filename", value="other.onnx"), "filename other.onnx"),
    ],
)
def test_files_beside_the_model_are_those_of_the_reference(
    damage: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    out = shutil.copytree(artifact("llama"), tmp_path / "out")
    damage(out)
    report = check(out, harness.checkpoint("llama").directory)
    assert failed(report) == {COMPANIONS}
    assert re.search(says, next(each.detail for each in report.checks if each.name == COMPANIONS))
