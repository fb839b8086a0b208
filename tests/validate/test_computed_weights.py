"""Weights are those that dispc computes: what no logit shows is found here."""

import json
from pathlib import Path
from typing import Any

import faults
import harness
import numpy as np
import onnx_ir as ir
import pytest
from artifacts import artifact, failed, judged

from dispc.quantisation import Quantisation
from dispc.validate import CheckOptions
from dispc.validate.checks.check import Check
from dispc.validate.checks.weights import NAME, judge_weights
from dispc.validate.comparison import Comparison

INT4 = Quantisation(bits=4, block_size=16, symmetric=True, head=False, embedding=False)
DOWN = "model.layers.1.mlp.down_proj.weight"
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


@pytest.mark.parametrize(
    ("options", "name", "change"),
    [
        ({}, DOWN, lambda w: w * 1.0001),
        ({}, "lm_head.weight", one_more),
        ({}, "model.layers.1.mlp.read", one_more),
        ({"dtype": "bfloat16", "target": "onnx"}, DOWN, lambda w: w * 1.05),
        ({"quantisation": INT4}, f"{DOWN}.scales", lambda w: w * np.nextafter(np.float32(1), np.float32(2))),
        ({"quantisation": INT4}, f"{DOWN}.quantised", one_more),
        ({"padding": "right"}, "cos_cache", lambda w: np.where(w == w.min(), np.nan, w)),
        ({}, "lm_head.weight", lambda w: np.pad(w, ((1, 0), (0, 0)))[:-1]),
    ],
)
def test_other_values_are_found_and_named(options: dict[str, Any], name: str, change: Any, tmp_path: Path) -> None:
    whole = artifact("llama", **options)
    assert (verdict(whole, "llama").status, verdict(whole, "llama").figure) == ("passed", 0.0)
    found = verdict(changed(name, change, whole, tmp_path), "llama")
    assert found.status == "failed" and found.detail.endswith(f"worst is {name}")


def test_the_last_place_may_differ(tmp_path: Path) -> None:
    found = verdict(
        changed("cos_cache", lambda w: np.nextafter(w, np.float32(2)), artifact("llama"), tmp_path), "llama"
    )
    assert found.status == "passed" and found.figure is not None and 0 < found.figure <= 1


def test_scales_that_a_norm_divides_by_again_are_found(tmp_path: Path) -> None:
    """No logit shows them: the norm after OLMo 2's attention takes out what is common to all."""
    whole = artifact("olmo2", target="onnx-cpu", quantisation=INT4)
    broken = changed(f"{WRITTEN}.scales", lambda w: w * 1.02, whole, tmp_path)
    assert failed(judged(broken, "olmo2")) == {NAME}


def test_integers_that_cannot_be_repeated_are_left_to_the_reference(tmp_path: Path) -> None:
    searched = Quantisation(bits=4, block_size=16, symmetric=False, head=False, embedding=False, algorithm="hqq")
    whole = artifact("llama", target="onnx-cpu", quantisation=searched)
    assert verdict(changed(f"{DOWN}.quantised", one_more, whole, tmp_path), "llama").status == "passed"
    assert verdict(changed("lm_head.weight", one_more, whole, tmp_path), "llama").status == "failed"


def test_another_release_may_compute_them_differently(tmp_path: Path) -> None:
    broken = changed(DOWN, lambda w: w * 1.01, artifact("llama"), tmp_path)
    manifest = json.loads((broken / "dispc.json").read_text())
    (broken / "dispc.json").write_text(json.dumps(manifest | {"dispc": "0.0.1"}))
    found = verdict(broken, "llama")
    assert found.status == "noted" and "dispc 0.0.1, here" in found.detail


def test_a_graph_with_none_of_the_names_fails(tmp_path: Path) -> None:
    def rename(model: ir.Model) -> None:
        for value in list(model.graph.initializers.values()):
            value.name = f"other.{value.name}"

    assert verdict(faults.plant(rename, artifact("llama"), tmp_path / "broken"), "llama").status == "failed"
