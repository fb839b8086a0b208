"""`dispc.apply_masks`: any trainer's model becomes the pruned one, and what it saves compiles."""

import re
from pathlib import Path

import harness
import pytest
import tiny
import torch
from student import student, text
from transformers import AutoModelForCausalLM

from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.reference.in_place import apply_masks
from dispc.reference.masked import load_reference
from dispc.support.errors import MasksError, UnsupportedModelError

DOCS = Path(__file__).parents[2] / "docs"
IDS = torch.arange(2, 26).view(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


PACKED = ("phi3", "gpt-neox", "gpt-neox-sequential")


@pytest.mark.parametrize("variant", sorted({*tiny.VARIANTS, *tiny.FURTHER} - {*PACKED}))
@pytest.mark.parametrize("norm_scope", ["full", "selected"])
def test_it_computes_what_the_reference_does_and_keeps_gradients_inside(variant: str, norm_scope: str) -> None:
    checkpoint = harness.checkpoint(variant)
    masks = Masks.random(checkpoint.config, 0.5, seed=1, norm_scope=norm_scope)  # type: ignore[arg-type]
    eager = "eager"  # transformers' other attentions leave Gemma-2's softcap out
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32, attn_implementation=eager)
    dense = logits(model)
    assert apply_masks(model, masks) is model
    expected = logits(load_reference(checkpoint, masks))
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.allclose(logits(model), dense, atol=1e-3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for index in range(checkpoint.config.num_hidden_layers):
        for part in model.get_submodule(checkpoint.family.block(index)).modules():
            if isinstance(part, torch.nn.Linear):
                assert part.weight.grad is not None
                assert not part.weight.grad[part.weight == 0].any()


def test_the_example_of_the_docs_trains_and_saves_the_pruned_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "recovery.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("MODEL").symlink_to(student())
    Path("train.txt").write_text(Path(text("train.txt", 3000, 2)).read_text())
    masks = Masks.random(Checkpoint(student()).config, 0.5, seed=0)
    masks.save(Path("masks.safetensors"), Checkpoint(student()).config)
    torch.manual_seed(0)
    exec(example, {})
    trained = AutoModelForCausalLM.from_pretrained("trained")
    assert torch.allclose(logits(trained), logits(load_reference(Checkpoint(Path("trained")), masks)), atol=1e-5)
    assert not torch.allclose(logits(trained), logits(load_reference(Checkpoint(student()), masks)), atol=1e-3)


def test_adapters_of_peft_are_masked_too() -> None:
    peft = pytest.importorskip("peft")
    masks = Masks.random(Checkpoint(student()).config, 0.5, seed=0)
    model = AutoModelForCausalLM.from_pretrained(student())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    apply_masks(wrapped, masks)
    assert torch.allclose(logits(wrapped), logits(load_reference(Checkpoint(student()), masks)), atol=1e-5)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    down = wrapped.base_model.model.model.layers[0].mlp.down_proj
    assert masks.blocks[0].mlp.mid is not None
    outside = torch.ones(down.in_features, dtype=torch.bool)
    outside[torch.from_numpy(masks.blocks[0].mlp.mid)] = False
    down.lora_B["default"].weight.data.normal_()
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    gradient = down.lora_A["default"].weight.grad
    assert gradient.any() and not gradient[:, outside].any()


def test_a_family_that_packs_its_projections_is_refused() -> None:
    checkpoint = harness.checkpoint("phi3")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory)
    with pytest.raises(UnsupportedModelError, match="dispc recover"):
        apply_masks(model, Masks.random(checkpoint.config, 0.5, seed=0))


def test_masks_of_another_model_and_a_second_time_are_refused() -> None:
    checkpoint = harness.checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory)
    other = Masks.random(harness.checkpoint("opt").config, 0.5, seed=0).with_metadata({"model_type": "opt"})
    with pytest.raises(MasksError, match="belong to another model"):
        apply_masks(model, other)
    masks = Masks.random(checkpoint.config, 0.5, seed=0)
    apply_masks(model, masks)
    with pytest.raises(UnsupportedModelError, match="already"):
        apply_masks(model, masks)
