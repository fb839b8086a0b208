"""Artifacts in ONNX Runtimes and onnxruntime-genais of other ages, in the environments that `make test-runtimes` makes.

An artifact runs, and computes what it computes here, from the ONNX Runtime on that its dispc.json names; with an older
one it does not load, or computes something else. So the table of versions promises neither too much nor too little.
"""

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import run_ort

from dispc.compiler import CompileOptions, compile_model
from dispc.manifest import read_manifest
from dispc.masks import Masks
from dispc.passes.common.versions import version_key
from dispc.quantisation import Quantisation

SCRIPTS = Path(run_ort.__file__).parent
ENVIRONMENTS = Path(__file__).parents[2] / "build" / "runtimes"


def quantisation(bits: int, *, embedding: bool = False, symmetric: bool = True, int8: bool = False) -> Quantisation:
    return Quantisation(
        bits=bits, block_size=16, symmetric=symmetric, head=embedding, embedding=embedding, int8_activations=int8
    )


ARTIFACTS: dict[str, tuple[str, dict[str, Any]]] = {
    "onnx-cpu": ("llama", {"target": "onnx-cpu"}),
    "onnx-cpu, padding left": ("llama", {"target": "onnx-cpu", "padding": "left"}),
    "onnx-cpu, one position of logits": ("llama", {"target": "onnx-cpu", "last_logits": True}),
    "onnx-cpu, inverse gather": ("llama-tied-biased", {"target": "onnx-cpu", "lowering": "inverse-gather"}),
    "onnx-cpu, sliding window": ("mistral-window", {"target": "onnx-cpu"}),
    "onnx-cpu, partial rotary": ("phi", {"target": "onnx-cpu"}),
    "onnx-cpu, layer norms": ("opt", {"target": "onnx-cpu"}),
    "onnx-cpu, head norms": ("qwen3", {"target": "onnx-cpu"}),
    "onnx-cpu, softcaps and windows": ("gemma2", {"target": "onnx-cpu"}),
    "onnx-cpu, two rotary bases": ("gemma3", {"target": "onnx-cpu"}),
    "onnx-cpu, interleaved rotary": ("cohere", {"target": "onnx-cpu"}),
    "onnx-cpu, norms after sub-layers": ("olmo2", {"target": "onnx-cpu"}),
    "onnx-cpu, norms that add one": ("nemotron", {"target": "onnx-cpu"}),
    "onnx, softcaps and windows": ("gemma2", {"target": "onnx"}),
    "onnx-cuda float16": ("llama", {"target": "onnx-cuda"}),
    "onnx": ("llama", {"target": "onnx"}),
    "onnx float16": ("llama", {"target": "onnx", "dtype": "float16"}),
    "int4": ("llama", {"target": "onnx-cpu", "quantisation": quantisation(4)}),
    "int4, int8 activations": ("llama", {"target": "onnx-cpu", "quantisation": quantisation(4, int8=True)}),
    "int4, embedding": ("llama", {"target": "onnx-cpu", "quantisation": quantisation(4, embedding=True)}),
    "int4 asymmetric, embedding": (
        "llama",
        {"target": "onnx-cpu", "quantisation": quantisation(4, embedding=True, symmetric=False)},
    ),
    "int8": ("llama", {"target": "onnx-cpu", "quantisation": quantisation(8)}),
    "int8, int8 activations": ("llama", {"target": "onnx-cpu", "quantisation": quantisation(8, int8=True)}),
}
TOLERANCES = {"float16": 5e-3, "int8 activations": 1e-2}
"""Share of the logits' range; versions round halves and int8 activations otherwise."""
FOR_GENAI = [name for name, (_, options) in ARTIFACTS.items() if options["target"] != "onnx-cuda"]
"""The others ask onnxruntime-genai for its CUDA build."""
FIRST_GENAI = {"onnx-cpu, one position of logits": "0.13"}
"""Artifacts that older ones refuse, which want logits of every position of a prompt."""


def versions(package: str) -> list[str]:
    """The versions of `package` that have an environment; without one the tests skip themselves."""
    names = [marker.parent.name for marker in ENVIRONMENTS.glob(f"{package}-[0-9]*/.installed")]
    return sorted((name.removeprefix(f"{package}-") for name in names), key=version_key)


@cache
def artifact(name: str) -> Path:
    variant, options = ARTIFACTS[name]
    out = harness.scratch() / f"runtimes-{name}"
    masks = harness.scratch() / f"runtimes-{variant}.safetensors"
    checkpoint = harness.checkpoint(variant)
    Masks.random(checkpoint.config, 0.4, 3).save(masks, checkpoint.config)
    model = checkpoint.directory
    compile_model(CompileOptions(model=model, output=out, masks=masks, validate=False, **options))
    return out


@cache
def expected(name: str) -> np.ndarray[Any, Any]:
    """Logits [steps, rows, V] with the ONNX Runtime of this environment, whose parity `dispc validate` judges."""
    return np.array(run_ort.decode(artifact(name))).reshape(1 + run_ort.STEPS, len(run_ort.PROMPTS), -1)


@cache
def tried(package: str, version: str) -> dict[str, Any]:
    """What `package` in `version` makes of every artifact."""
    script, names = {"onnxruntime": ("run_ort.py", list(ARTIFACTS)), "genai": ("run_genai.py", FOR_GENAI)}[package]
    return outcomes([ENVIRONMENTS / f"{package}-{version}" / "bin" / "python", SCRIPTS / script], names)


def outcomes(command: list[Path], names: list[str]) -> dict[str, Any]:
    """What `command` prints of these artifacts; where it is killed, of each by itself: some versions crash on some."""
    done = subprocess.run([*command, *map(artifact, names)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found = json.loads(done.stdout.splitlines()[-1])["artifacts"]
        return dict(zip(names, found.values(), strict=True))
    assert done.returncode < 0, done.stderr
    if len(names) == 1:
        return {names[0]: {"error": f"ended by signal {-done.returncode}"}}
    return {name: outcomes(command, [name])[name] for name in names}


@pytest.mark.parametrize("name", ARTIFACTS)
@pytest.mark.parametrize("version", versions("onnxruntime"))
def test_an_artifact_runs_from_the_onnx_runtime_on_that_it_names(version: str, name: str) -> None:
    found = tried("onnxruntime", version)[name]
    needed = read_manifest(artifact(name)).needs.onnxruntime
    error = np.inf
    if "logits" in found:
        logits = np.array(found["logits"]).reshape(expected(name).shape)
        error = float(np.abs(logits - expected(name)).max() / np.ptp(expected(name)))
    tolerance = next((value for kind, value in TOLERANCES.items() if name.endswith(kind)), 1e-5)
    new_enough = version_key(version) >= version_key(needed)
    assert (error <= tolerance) == new_enough, f"needs {needed}: {found.get('error') or f'{error:.2g} of the range'}"


@pytest.mark.parametrize("name", FOR_GENAI)
@pytest.mark.parametrize("version", versions("genai"))
def test_onnxruntime_genai_says_the_same_tokens(version: str, name: str) -> None:
    found = tried("genai", version)[name]
    if version_key(version) < version_key(FIRST_GENAI.get(name, "0.6")):
        assert "invalid dimensions for output: logits" in found["error"]
        return
    assert "tokens" in found, found["error"]
    stops = set(read_manifest(artifact(name)).stop_tokens)
    for row, tokens in enumerate(found["tokens"]):
        greedy = expected(name)[:, row].argmax(axis=1).tolist()
        said = [token for token in tokens if token not in stops]
        assert said == greedy[: len(said)] and (len(said) == len(greedy) or greedy[len(said)] in stops)
