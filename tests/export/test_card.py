"""The model card: Hugging Face can read it, its code runs, and it says what the artifact's files say and no more."""

import dataclasses
import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import harness
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from language import make_tokenizer

from dispc.compiler import CompileOptions, compile_model
from dispc.export.card import front_matter, write_card
from dispc.manifest import LICENCE_FILES, BlockParameters, Needs, read_manifest
from dispc.masks import SETS, Masks
from dispc.model.checkpoint import Checkpoint


@cache
def artifact() -> Path:
    """Pruned, validated, with a tokenizer."""
    model = harness.scratch() / "card-model"
    shutil.copytree(harness.checkpoint("llama").directory, model)
    make_tokenizer(model)
    config = Checkpoint(model).config
    Masks.random(config, 0.4, 3).save(model / "masks.safetensors", config)
    compile_model(CompileOptions(model=model, output=harness.scratch() / "card-out", target="onnx-cpu"))
    return harness.scratch() / "card-out"


def card(directory: Path, *, masks: dict[str, str] | None = None, **manifest: Any) -> str:
    """The card written into `directory`, with these metadata of the masks and these entries of dispc.json changed."""
    found = Masks.load(artifact() / "masks.safetensors")
    if masks is not None:
        found = dataclasses.replace(found, metadata=masks)
    checkpoint = Checkpoint(harness.scratch() / "card-model")
    write_card(checkpoint, found, dataclasses.replace(read_manifest(artifact()), **manifest), "", directory)
    return (directory / "README.md").read_text(encoding="utf-8")


def split(text: str) -> tuple[dict[str, Any], str]:
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table after `heading`, without its rule."""
    lines = text.split(heading, 1)[1].split("\n\n")
    rows = next(part for part in lines if part.startswith("|")).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    return [cells[0], *cells[2:]]


def test_the_compiled_artifact_has_the_card_of_its_manifest_and_masks(tmp_path: Path) -> None:
    assert (artifact() / "README.md").read_text(encoding="utf-8") == card(tmp_path)


def test_hugging_face_reads_the_front_matter() -> None:
    from huggingface_hub import ModelCard

    data = ModelCard.load(artifact() / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("onnxruntime", "text-generation", "unknown")
    assert "onnx" in data.tags
    assert data.base_model is None  # a local directory does not say where the model is from


def test_the_tables_hold_the_widths_parameters_and_errors_of_the_manifest() -> None:
    text, manifest = (artifact() / "README.md").read_text(encoding="utf-8"), read_manifest(artifact())
    head, *rows = table(text, "## Widths")
    assert [name.split(" of ")[0] for name in head[1:]] == list(SETS)
    assert [[int(cell) for cell in row] for row in rows] == [
        [i, *(row[name] for name in SETS)] for i, row in enumerate(manifest.widths)
    ]
    kept = manifest.block_parameters.kept
    assert f"{kept:,} of" in dict(table(text, "# card-model"))["block parameters kept"]
    assert manifest.validation is not None
    checks = manifest.validation["checks"]
    rows = table(text, "## Parity")[1:]
    assert [row[:3] for row in rows] == [[c["name"], "passed", f"{c['figure']:.3g}"] for c in checks]
    assert all(row[3].endswith(c["unit"]) for row, c in zip(rows, checks, strict=True))
    assert manifest.validation["truth"] == "reference in float64" and "reference in float64" in text
    assert manifest.validation["artifact"] == artifact().name  # not a path of the machine that made it


def test_nothing_is_said_that_is_not_known(tmp_path: Path) -> None:
    text = card(tmp_path, masks={"method": "magnitude"}, validation=None)
    assert "Not checked" in text and "error" not in text and "assed" not in text
    assert [name for name, _ in table(text, "## Masks")[1:]] == ["method", "norm scope", "sha256"]
    assert "erplexity" not in text


def test_perplexity_comes_from_the_metadata_of_the_masks(tmp_path: Path) -> None:
    text = card(tmp_path, masks={"method": "DISP-LLM", "perplexity_pruned": "40.4", "steps": "1198"})
    assert dict(table(text, "## Masks"))["perplexity pruned"] == "40.4"


def test_a_failed_check_is_called_one(tmp_path: Path) -> None:
    validation = json.loads(json.dumps(read_manifest(artifact()).validation)) | {"passed": False}
    validation["checks"][1] |= {"passed": False, "status": "failed", "figure": None}
    text = card(tmp_path, validation=validation)
    assert "FAILED, judged on" in text
    marks = [row[1] for row in table(text, "## Parity")[1:]]
    assert marks == ["failed" if number == 1 else "passed" for number in range(len(validation["checks"]))]


def test_a_dense_artifact_is_not_called_pruned(tmp_path: Path) -> None:
    assert "Nothing is pruned." in card(tmp_path, block_parameters=BlockParameters(dense=10, kept=10))


@given(st.dictionaries(st.sampled_from(["method", "data", "seed", "perplexity"]), st.text(), min_size=1))
@settings(max_examples=25)
def test_no_metadata_breaks_a_table_or_the_front_matter(metadata: dict[str, str]) -> None:
    directory = harness.scratch() / "card-metadata"
    directory.mkdir(exist_ok=True)
    text = card(directory, masks=metadata)
    matter, body = split(text)
    assert matter["library_name"] == "onnxruntime"
    rows = table(body, "## Masks")
    assert len(rows) == 3 + len(metadata)
    assert all(len(row) == 2 for row in rows)
    assert not set("<\\") & set("".join(cell for row in rows for cell in row))


@pytest.mark.parametrize(
    ("padding", "says"), [("left", "batches are padded on the left"), ("right", "one prompt at a time")]
)
def test_the_card_says_which_batches_each_runtime_can_feed(padding: str, says: str, tmp_path: Path) -> None:
    text = card(tmp_path, padding=padding)
    assert f"ONNX Runtime; batches are padded on the {padding}:" in text
    assert says in text.split("\noptimum; ")[1].split("```")[0]
    assert "right" in text.split("onnxruntime-genai; ")[1].split("```")[0]


@pytest.mark.parametrize(("needs", "says"), [("1.18", "ONNX Runtime 1.18 or newer"), ("1.27", "1.27")])
def test_the_card_names_the_first_onnx_runtime(needs: str, says: str, tmp_path: Path) -> None:
    text = card(tmp_path, needs=Needs(onnxruntime=needs, opset=21))
    assert says in dict(table(text, "# card-model"))["runs in"]


@pytest.mark.parametrize("target", ["onnx", "onnx-cuda"])
def test_a_card_of_bfloat16_shows_what_can_load_it_only(target: str, tmp_path: Path) -> None:
    text = card(tmp_path, target=target, dtype="bfloat16")
    assert re.findall(r"(\w+ExecutionProvider)\W\]", text) == ["CUDAExecutionProvider"]
    assert "og.Model" not in text and "ORTModelForCausalLM" not in text and "--dtype float16" in text


def test_what_compiling_noted_is_on_the_card(tmp_path: Path) -> None:
    note = "YaRN reaches 160 positions, but max_position_embeddings is 40"
    assert dict(table(card(tmp_path, notes=[note]), "# card-model"))["note 1"] == note
    assert "note 1" not in card(tmp_path)


# The licence


def model_with(directory: Path, **files: str | bytes) -> Path:
    """A directory with these files; their names are given without a dot before md."""
    for name, content in files.items():
        path = directory / name.replace("_md", ".md")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return directory


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"README_md": "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# X"},
            {"license": "apache-2.0", "language": ["en"]},
        ),
        (
            {
                "README_md": "---\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE\n---\n",
                "LICENSE": "terms",
            },
            {"license": "other", "license_name": "llama2", "license_link": "LICENSE"},
        ),
        ({"README_md": "\ufeff---\r\nlicense: mit\r\n---\r\n# X"}, {"license": "mit"}),
        ({"LICENSE": "terms"}, {"license": "other", "license_link": "LICENSE"}),
        (
            {"README_md": "# no front matter\n", "LICENSE_md": "terms"},
            {"license": "other", "license_link": "LICENSE.md"},
        ),
        ({}, {"license": "unknown"}),
        ({"README_md": "---\nlicense: [a, b\n---\n"}, {"license": "unknown"}),
        ({"README_md": "---\n- license\n---\n"}, {"license": "unknown"}),
        ({"README_md": "---\nlicense: 3\n---\n"}, {"license": "unknown"}),
        ({"README_md": b"---\nlicense: \xff\n---\n"}, {"license": "unknown"}),
        ({"README_md": "---\nlicense: !!python/object/apply:os.getcwd []\n---\n"}, {"license": "unknown"}),
    ],
)
def test_the_licence_is_that_of_the_base_model(files: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    matter = front_matter(model_with(tmp_path, **files)).to_dict()
    assert {
        key: matter[key] for key in ("license", "license_name", "license_link", "language") if key in matter
    } == expected


@pytest.mark.parametrize("files", [{}, {"LICENSE": "terms"}, {"README_md": "---\nlicense: mit\n---\n", "NOTICE": "us"}])
def test_licence_files_go_with_the_artifact_and_the_card_names_them(files: dict[str, str], tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(harness.scratch() / "card-model", model) if artifact() else None
    checkpoint = Checkpoint(model_with(model, **files))
    out.mkdir()
    write_card(checkpoint, Masks.load(model / "masks.safetensors"), read_manifest(artifact()), "", out)
    text = (out / "README.md").read_text(encoding="utf-8").split("## Licence")[1]
    copied = {name: content for name, content in files.items() if LICENCE_FILES.fullmatch(name)}
    assert {file.name: file.read_text() for file in out.iterdir() if file.name != "README.md"} == copied
    assert all(f"]({name})" in text for name in copied)
    assert ("mit" in text) == ("README_md" in files)
    assert ("not known" in text) == (not files)


def test_the_base_model_is_named_where_the_hubs_cache_names_it(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--HuggingFaceTB--SmolLM2-135M" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert front_matter(snapshot)["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert "base_model" not in front_matter(snapshot.parent).to_dict()


# The code


@pytest.mark.extras
@pytest.mark.parametrize("package", ["onnxruntime", "onnxruntime_genai", "optimum.onnxruntime"])
def test_the_code_on_the_card_loads_the_artifact(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads of this model are of another size than hidden_size / heads, so optimum needs the line about that."""
    pytest.importorskip(package)
    monkeypatch.chdir(artifact())
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = next(block for block in blocks if re.search(rf"(import|from) {package}\b", block))
    names: dict[str, Any] = {}
    exec(code, names)
    if package.startswith("optimum"):
        import torch

        ids = torch.tensor([[5, 77, 12]])
        assert (
            names["model"].generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2).shape[1] > 3
        )
