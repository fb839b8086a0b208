"""A language small enough for a tiny model to learn in seconds: words that follow each other by fixed odds."""

from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dispc.model.text import tokenise

SPECIAL = ["<pad>", "<s>", "</s>"]
ASCII = [chr(code) for code in range(33, 127)]
HALVES = ["\u0120", *"\u00c3\u00a9\u00e2\u0124\u00ac\u00f0\u0141\u013a\u0122"]
"""How byte-level tokenizers spell the space, and the bytes of a two-, a three- and a four-byte character."""
WORDS = ("the", "sea", "is", "salt", "and", "deep", "blue", "cold", "wide", "old")


def make_tokenizer(directory: Path, template: str | None = None, **options: Any) -> None:
    """A byte-level tokenizer of 131 tokens: special ones, ASCII, the space, and bytes that are parts of characters."""
    rest = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {*ASCII, *HALVES})
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *ASCII, *HALVES, *rest][:131])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)
    fast.chat_template = template
    fast.save_pretrained(directory)


def make_text(words: int, seed: int) -> str:
    """Words of a Markov chain, the same chain for every seed."""
    odds = np.random.default_rng(0).dirichlet(np.full(len(WORDS), 0.2), len(WORDS))
    rng, word, text = np.random.default_rng(seed), 0, []
    for _ in range(words):
        word = int(rng.choice(len(WORDS), p=odds[word]))
        text.append(WORDS[word])
    return " ".join(text)


def make_student(variant: str, directory: Path, *, steps: int = 150) -> Path:
    """A tiny model of `variant` that has learned the language, with its tokenizer."""
    tiny.make_model(variant, directory)
    make_tokenizer(directory)
    tokens = torch.from_numpy(tokenise(make_text(4000, seed=1), directory).astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(directory)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        at = torch.randint(len(tokens) - 64, (8,), generator=generator)
        ids = torch.stack([tokens[start : start + 64] for start in at.tolist()])
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(directory)
    return directory
