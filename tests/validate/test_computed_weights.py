"""Weights are those that dispc computes: what no logit shows is found here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import harness
import language
import numpy as np
import onnx_ir as ir
import pytest
import tiny
from artifacts import artifact, failed, judged

from dispc.compiler import CompileOptions, compile_model
from dispc.quantisation import Quantisation
from dispc.validate import CheckOptions
from dispc.validate.checks.check import Check
from dispc.validate.checks.weights import NAME, judge_weights
from dispc.validate.comparison import Comparison

INT4 = Quantisation(bits=4, block_size=16, symmetric=True, head=False, embedding=False)
SEARCHED = replace(INT4, symmetric=False, algorithm="hqq")
WIDE = replace(SEARCHED, int8=("1.mlp.write",), mixed="widths")
TIED = replace(INT4, head=True, embedding=True)
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
WRITTEN = "model.layers.2.self_attn.o_proj.weight"


def verdict(out: Path, variant: str) -> Check:
    (found,) = judge_weights(Comparison(out, harness.checkpoint(variant).directory, CheckOptions(device="cpu")))
    return found


def changed(name: str, change: Any, whole: Path, folder: Path) -> Path:
    """A copy of an artifact in which `change` was applied to the values of one initializer."""

    def plant(model: ir.Model) -> None:
        values = faults.initializer(model, name)
        faults.replace(model, name, change(values).astype(values.dtype))

    return faults.plant(plant, whole, folder / name)


def one_more(values: harness.Array) -> harness.Array:
    flat = values.reshape(-1).copy()
    flat[len(flat) // 2] += 1
    return flat.reshape(values.shape)


def others(values: harness.Array) -> harness.Array:
    """Every eighth integer is another."""
    flat = values.reshape(-1).copy()
    flat[::8] ^= 1
    return flat.reshape(values.shape)


@pytest.mark.parametrize(
    ("options", "name", "change", "says"),
    [
        ({}, DOWN, lambda w: w * 1.0001, "off by "),
        ({}, DOWN, lambda w: np.where(w == w.max(), np.nan, w), "off by inf units"),
        ({}, "lm_head.weight", one_more, "off by "),
        ({}, "lm_head.weight", lambda w: np.pad(w, ((1, 0), (0, 0)))[:-1], "off by "),
        ({}, "model.layers.1.mlp.read", one_more, "other numbers"),
        ({"dtype": "bfloat16", "target": "onnx"}, DOWN, lambda w: w * 1.05, "off by "),
        (
            {"dtype": "bfloat16", "target": "onnx"},
            DOWN,
            lambda w: w * 1.01,
            "% of its numbers are others (allowed 1 %)",
        ),
        (
            {"quantisation": INT4},
            f"{DOWN}.scales",
            lambda w: w * np.float32(1.00001),
            "% of its numbers are others",
        ),
        ({"quantisation": INT4}, f"{DOWN}.quantised", others, "12.5 % of its numbers are others (allowed 0.1 %)"),
        ({"quantisation": TIED}, f"{EMBEDDING}.scales", lambda w: w * 1.02, "% of its numbers are others"),
        ({"quantisation": SEARCHED}, f"{DOWN}.scales", lambda w: w * 1.02, "are others (allowed 1 %)"),
        ({"quantisation": WIDE}, f"{DOWN}.scales", lambda w: w * 1.02, "are others (allowed 0.1 %)"),
        ({"padding": "right"}, "cos_cache", lambda w: np.where(w == w.min(), np.nan, w), "off by inf units"),
    ],
)
def test_other_values_are_found_and_named(
    options: dict[str, Any], name: str, change: Any, says: str, tmp_path: Path
) -> None:
    whole = artifact("llama", **options)
    assert verdict(whole, "llama").status == "passed"
    found = verdict(changed(name, change, whole, tmp_path), "llama")
    assert found.status == "failed" and f"dispc computes: {name}: " in found.detail and says in found.detail


def test_the_last_place_may_differ(tmp_path: Path) -> None:
    nudged = changed("cos_cache", lambda w: np.nextafter(w, np.float32(2)), artifact("llama"), tmp_path)
    assert verdict(nudged, "llama").status == "passed"


def test_a_weight_that_is_not_there_is_named(tmp_path: Path) -> None:
    def rename(model: ir.Model) -> None:
        model.graph.initializers[DOWN].name = "other"

    assert f"{DOWN}: missing" in verdict(faults.plant(rename, artifact("llama"), tmp_path / "broken"), "llama").detail


def test_scales_that_a_norm_divides_by_again_are_found(tmp_path: Path) -> None:
    """No logit shows them: the norm after OLMo 2's attention takes out what is common to all."""
    whole = artifact("olmo2", target="onnx-cpu", quantisation=INT4)
    broken = changed(f"{WRITTEN}.scales", lambda w: w * 1.02, whole, tmp_path)
    assert failed(judged(broken, "olmo2")) == {NAME}


def test_what_depends_on_a_text_is_left_to_the_reference(tmp_path: Path) -> None:
    model = tiny.make_model("llama", tmp_path / "model")
    language.make_tokenizer(model)
    (tmp_path / "text.txt").write_text(language.make_text(300, 4))
    options = CompileOptions(
        model=model,
        output=tmp_path / "out",
        dense=True,
        target="onnx-cpu",
        quantisation=replace(SEARCHED, algorithm="gptq"),
        data=str(tmp_path / "text.txt"),
        validate=False,
    )
    compile_model(options)
    broken = changed(f"{DOWN}.scales", lambda w: w * 1.02, tmp_path / "out", tmp_path)
    for out, status in ((broken, "passed"), (changed("lm_head.weight", one_more, broken, tmp_path), "failed")):
        (found,) = judge_weights(Comparison(out, model, CheckOptions(device="cpu")))
        assert found.status == status


def test_another_release_may_compute_them_differently(tmp_path: Path) -> None:
    broken = changed(DOWN, lambda w: w * 1.01, artifact("llama"), tmp_path)
    manifest = json.loads((broken / "dispc.json").read_text())
    (broken / "dispc.json").write_text(json.dumps(manifest | {"dispc": "0.0.1"}))
    found = verdict(broken, "llama")
    assert found.status == "noted" and "dispc 0.0.1, here" in found.detail
