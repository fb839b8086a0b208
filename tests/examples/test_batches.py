"""Batches through optimum, whose `generate` pads on the left: right with an artifact for that side, row by row."""

from pathlib import Path
from typing import Any

import harness
import pytest
import torch

from dispc.compiler import CompileOptions, compile_model
from dispc.masks import Masks

pytestmark = pytest.mark.extras
PROMPTS = [harness.TOKENS[:7].tolist(), harness.TOKENS[2:5].tolist(), harness.TOKENS[9:10].tolist()]
STEPS = 8


def generated(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What `model` says after each of the prompts, in one batch padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = dict(max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    found: list[list[int]] = model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
    return found


@pytest.mark.parametrize("variant", ["llama", "phi", "gemma3"])
@pytest.mark.parametrize("target", ["onnx", "onnx-cpu"])
def test_a_batch_padded_on_the_left_says_what_each_prompt_says_alone(target: str, variant: str, tmp_path: Path) -> None:
    optimum: Any = pytest.importorskip("optimum.onnxruntime")
    checkpoint = harness.checkpoint(variant)
    Masks.random(checkpoint.config, 0.3, 8).save(tmp_path / "masks.safetensors", checkpoint.config)
    options: dict[str, Any] = dict(target=target, padding="left", validate=False)
    compile_model(
        CompileOptions(
            model=checkpoint.directory, masks=tmp_path / "masks.safetensors", output=tmp_path / "out", **options
        )
    )  # fmt: skip
    model = optimum.ORTModelForCausalLM.from_pretrained(str(tmp_path / "out"), provider="CPUExecutionProvider")
    model.embed_size_per_head = checkpoint.config.head_dim
    batch = generated(model, PROMPTS)
    assert batch == [generated(model, [prompt])[0] for prompt in PROMPTS]
    assert len({*map(tuple, batch)}) > 1
