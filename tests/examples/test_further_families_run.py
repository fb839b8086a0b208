"""Artifacts of every further family in onnxruntime-genai and in optimum."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import tiny
import torch

from dispc.compiler import CompileOptions, compile_model
from dispc.masks import Masks
from dispc.reference.masked import load_reference

pytestmark = [pytest.mark.extras, pytest.mark.xdist_group("further-families")]
ONE_EACH = [variant for variant in tiny.FURTHER if variant not in ("granite-tied", "gpt-neox-sequential")]
PROMPT, STEPS = harness.TOKENS[:6], 12


@cache
def masks(variant: str) -> Masks:
    return Masks.random(harness.checkpoint(variant).config, 0.3, 8)


@cache
def compiled(variant: str) -> Path:
    out = harness.scratch() / f"runs-{variant}"
    checkpoint = harness.checkpoint(variant)
    masks(variant).save(harness.scratch() / f"runs-{variant}.safetensors", checkpoint.config)
    file = harness.scratch() / f"runs-{variant}.safetensors"
    options = CompileOptions(model=checkpoint.directory, masks=file, output=out, target="onnx-cpu", validate=False)
    compile_model(options)
    return out


@cache
def expected(variant: str) -> list[int]:
    """The reference's greedy continuation."""
    model: Any = load_reference(harness.checkpoint(variant), masks(variant))
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(STEPS):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
    return tokens


def until_stop(tokens: list[int], variant: str) -> list[int]:
    """The tokens before one that ends a generation."""
    stops = harness.checkpoint(variant).stop_tokens
    ends = [place for place, token in enumerate(tokens) if place >= len(PROMPT) and token in stops]
    return tokens[: ends[0]] if ends else tokens


@pytest.mark.parametrize("variant", ONE_EACH)
def test_genai_says_what_the_reference_says(variant: str) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(compiled(variant)))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=len(PROMPT) + STEPS, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens(PROMPT.astype(np.int32)[None])
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)]
    assert until_stop(found, variant) == until_stop(expected(variant), variant)


@pytest.mark.parametrize("variant", ONE_EACH)
def test_optimum_says_what_the_reference_says_when_it_is_told_what_the_card_says(variant: str) -> None:
    optimum: Any = pytest.importorskip("optimum.onnxruntime")
    model = optimum.ORTModelForCausalLM.from_pretrained(str(compiled(variant)), provider="CPUExecutionProvider")
    card = (compiled(variant) / "README.md").read_text(encoding="utf-8")
    for name, value in re.findall(r"^model\.(\w+) = (\d+)  #", card, re.MULTILINE):
        setattr(model, name, int(value))
    ids = torch.from_numpy(PROMPT)[None]
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False)
    assert until_stop(found[0].tolist(), variant) == until_stop(expected(variant), variant)
