"""The examples: every runtime loads the artifacts it is said to load, and says what `dispc generate` says."""

import json
import shutil
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import command
import harness
import pytest
from language import make_student, make_tokenizer
from runtimes import EXAMPLES, JAVASCRIPT, say, served

from dispc.compiler import CompileOptions, compile_model
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.tokenizer import load_tokenizer
from dispc.quantisation import Quantisation

pytestmark = [pytest.mark.extras, pytest.mark.xdist_group("examples")]  # one worker, so that the student is made once
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.content }} {% endfor %}"
PROMPT, LIMIT = "the deep", 32
INT4 = Quantisation(bits=4, block_size=16, symmetric=True, head=True, embedding=True)
ARTIFACTS: dict[str, dict[str, Any]] = {
    "onnx": {"target": "onnx"},
    "onnx float16": {"target": "onnx", "dtype": "float16"},
    "onnx-cpu": {"target": "onnx-cpu"},
    "onnx-cpu, padding left": {"target": "onnx-cpu", "padding": "left"},
    "onnx-cpu int4": {"target": "onnx-cpu", "quantisation": INT4},
    "onnx-cuda float16": {"target": "onnx-cuda", "dtype": "float16"},
    "onnx-cuda float32": {"target": "onnx-cuda", "dtype": "float32"},
}
FOR_CUDA = ("onnx-cuda float16", "onnx-cuda float32")
LEFT_OUT = {("genai", name) for name in FOR_CUDA}  # the artifacts ask for the CUDA build of onnxruntime-genai
LEFT_OUT |= {("browser", name) for name in ("onnx", "onnx-cpu, padding left", *FOR_CUDA)}  # a browser is slow
MATRIX = [(e, a) for a in ARTIFACTS for e in EXAMPLES if (e, a) not in LEFT_OUT]


@cache
def student() -> Path:
    """A model with clear opinions, so that no runtime's rounding decides a token, and a chat template."""
    directory = make_student("llama", harness.scratch() / "examples-student")
    make_tokenizer(directory, TEMPLATE)
    config = Checkpoint(directory).config
    Masks.random(config, 0.2, 3).save(directory / "masks.safetensors", config)
    return directory


@cache
def compiled(name: str) -> Path:
    out = harness.scratch() / f"examples-{name}"
    compile_model(CompileOptions(model=student(), output=out, validate=False, **ARTIFACTS[name]))
    return out


@cache
def expected(name: str) -> str:
    outcome = command.run("generate", compiled(name), PROMPT, "--max-new-tokens", LIMIT)
    assert outcome.code == 0, outcome
    return outcome.out.removesuffix("\n")


@pytest.mark.parametrize(("example", "artifact"), MATRIX)
def test_every_runtime_says_what_dispc_says(example: str, artifact: str) -> None:
    assert len(expected(artifact)) == LIMIT  # a token of the student is a letter
    assert say(example, compiled(artifact), PROMPT, LIMIT) == expected(artifact)


@pytest.mark.parametrize("example", ["onnxruntime", "genai", "optimum", "node"])  # the browser runs the code of node
def test_every_runtime_stops_before_a_stop_token(example: str, tmp_path: Path) -> None:
    """The artifact's own files say where: genai_config.json, generation_config.json or dispc.json, by runtime."""
    letter = sorted(set(expected("onnx-cpu")[8:]) - set(expected("onnx-cpu")[:8]))[0]
    stop = load_tokenizer(student()).convert_tokens_to_ids(letter.replace(" ", "\u0120"))
    for file in student().iterdir():
        (tmp_path / file.name).hardlink_to(file)
    generation = json.loads((tmp_path / "generation_config.json").read_text()) | {"eos_token_id": [2, stop]}
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    out = tmp_path / "out"
    compile_model(CompileOptions(model=tmp_path, output=out, target="onnx-cpu", validate=False))
    said = say(example, out, PROMPT, LIMIT)
    if example == "optimum":  # generate() returns the stop token too; decoding drops it only where it is a special one
        said = said.removesuffix(letter)
    assert said == expected("onnx-cpu").split(letter)[0]


@pytest.mark.parametrize("example", ["onnxruntime", "genai", "optimum", "node"])
def test_every_runtime_ends_where_the_context_does(example: str) -> None:
    positions = Checkpoint(student()).config.max_positions
    said = say(example, compiled("onnx-cpu"), PROMPT, 10 * positions)
    assert said.startswith(expected("onnx-cpu")) and len(said) <= positions


@pytest.mark.parametrize("example", ["onnxruntime", "genai", "optimum", "node"])
def test_every_runtime_continues_the_prompt_where_there_is_no_chat_template(example: str, tmp_path: Path) -> None:
    model = shutil.copytree(student(), tmp_path / "model")
    make_tokenizer(model)
    (model / "chat_template.jinja").unlink()
    out = tmp_path / "out"
    compile_model(CompileOptions(model=model, output=out, target="onnx-cpu", validate=False))
    raw = command.run("generate", out, PROMPT, "--max-new-tokens", LIMIT)
    assert raw.code == 0 and raw.out.removesuffix("\n") != expected("onnx-cpu")
    assert say(example, out, PROMPT, LIMIT) == raw.out.removesuffix("\n")


@pytest.mark.parametrize(
    "path", ["/artifact/../../secret", "/../secret", "/artifact/%2e%2e/secret", "/artifact//secret"]
)
def test_the_pages_server_shows_its_folder_and_the_artifact_only(path: str, tmp_path: Path) -> None:
    for name in ("secret", "out/dispc.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def get(path: str) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", port)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()

    with served(tmp_path / "out") as port:
        assert get("/artifact/dispc.json") == (200, b"out/dispc.json")
        assert get("/page.mjs") == (200, (JAVASCRIPT / "page.mjs").read_bytes())
        assert get(path)[0] == 404


def test_the_lock_file_names_no_registry() -> None:
    assert "resolved" not in (JAVASCRIPT / "package-lock.json").read_text()
