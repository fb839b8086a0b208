"""Weights that no rule of ours rounded: the reference reads an artifact's integers, and knows others from them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import harness
import numpy as np
import onnx_ir as ir
import pytest
import student
from artifacts import failed
from sets import half

from dispc.algorithms import ALGORITHMS
from dispc.compiler import CompileOptions, compile_model
from dispc.masks import Masks
from dispc.quantisation import Quantisation
from dispc.support.errors import ArtifactError
from dispc.validate import CheckOptions, check

INT4 = Quantisation(bits=4, block_size=16, symmetric=False, head=True, embedding=True)
READ = [name for name, row in ALGORITHMS.items() if not row.repeatable]
SCALES = "model.layers.1.mlp.down_proj.weight.scales"


def artifact(algorithm: str, mixed: str | None = None) -> Path:
    """Of the model that speaks a language; validated when it was made."""
    out = harness.scratch() / f"integers-{algorithm}-{mixed}"
    if out.is_dir():
        return out
    masks = out.with_suffix(".safetensors")
    half("llama").save(masks, harness.checkpoint("llama").config)
    quantisation = replace(INT4, algorithm=algorithm, mixed=mixed)
    data = student.text("calibration.txt", 2000, 5) if quantisation.wants_text else None
    options: dict[str, Any] = dict(target="onnx-cpu", quantisation=quantisation, data=data)
    assert compile_model(CompileOptions(model=student.student(), masks=masks, output=out, **options)).passed
    return out


@pytest.mark.parametrize(
    ("algorithm", "mixed"), [*((name, None) for name in ALGORITHMS), ("gptq", "widths"), ("rtn", "damage")]
)
def test_artifacts_of_every_algorithm_pass(algorithm: str, mixed: str | None) -> None:
    out = artifact(algorithm, mixed)
    report = check(out, student.student(), CheckOptions(masks=out / "masks.safetensors"))
    assert report.passed, failed(report)


@pytest.mark.parametrize("algorithm", READ)
@pytest.mark.parametrize(
    "options",
    [{"target": "onnx-cuda"}, {"target": "onnx-cuda", "dtype": "bfloat16"}, {"target": "onnx-cpu", "align": 8}],
    ids=str,
)
def test_parts_of_a_product_are_found_between_aligned_widths(
    algorithm: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Each of two projections that lie side by side ends with rows of zeros, and every read with columns of zeros."""
    config, some = harness.checkpoint("llama").config, {"mlp.mid": [*range(5, 26)], "mlp.read": [*range(20)]}
    Masks.from_indices([some] * config.num_hidden_layers, config, norm_scope="full").save(tmp_path / "masks", config)
    quantisation = replace(INT4, algorithm=algorithm)
    data = student.text("calibration.txt", 2000, 5) if quantisation.wants_text else None
    compiled = CompileOptions(
        model=student.student(),
        masks=tmp_path / "masks",
        output=tmp_path / "out",
        quantisation=quantisation,
        data=data,
        **options,
    )
    assert compile_model(compiled).passed
    report = check(tmp_path / "out", student.student(), CheckOptions(masks=tmp_path / "masks", device="cpu"))
    assert report.passed, failed(report)


def stretch(rows: slice, blocks: slice, factor: float) -> faults.Fault:
    def fault(model: ir.Model) -> None:
        scales = faults.initializer(model, SCALES)
        scales[rows, blocks] *= factor
        faults.replace(model, SCALES, scales)

    return fault


def sway(model: ir.Model) -> None:
    """Rows in turns too large and too small: all in all nothing is."""
    scales = faults.initializer(model, SCALES)
    scales[::2] *= 1.3
    scales[1::2] *= 0.7
    faults.replace(model, SCALES, scales)


def roll(model: ir.Model) -> None:
    name = SCALES.replace("scales", "quantised")
    faults.replace(model, name, np.roll(faults.initializer(model, name), 1, axis=0))


ROW, BLOCK, ALL = slice(3, 4), slice(1, 2), slice(None)
FAULTS = {
    "all 1.5 times": stretch(ALL, ALL, 1.5),
    "all 1.03 times": stretch(ALL, ALL, 1.03),
    "a row 1.5 times": stretch(ROW, ALL, 1.5),
    "a row of zeros": stretch(ROW, ALL, 0.0),
    "a row negated": stretch(ROW, ALL, -1.0),
    "rows 1.3 and 0.7 times in turns": sway,
    "of the rows beside": roll,
}
IN_A_BLOCK = {"a block 1.5 times": stretch(ROW, BLOCK, 1.5), "a block of zeros": stretch(ROW, BLOCK, 0.0)}


def test_an_embedding_that_gptq_does_not_round_is_compared_with_rounding_to_the_nearest(tmp_path: Path) -> None:
    def fault(model: ir.Model) -> None:
        name = "model.embed_tokens.weight.scales"
        scales = faults.initializer(model, name)
        scales[101, 0] *= 1.1
        faults.replace(model, name, scales)

    broken = faults.plant(fault, artifact("gptq"), tmp_path / "broken")
    report = check(broken, student.student(), CheckOptions(masks=broken / "masks.safetensors", quick=True))
    assert "embeddings" in failed(report)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("algorithm", READ)
def test_other_weights_are_known(algorithm: str, fault: str, tmp_path: Path) -> None:
    refused(algorithm, FAULTS[fault], tmp_path)


@pytest.mark.parametrize("fault", IN_A_BLOCK)
@pytest.mark.parametrize("algorithm", [name for name in READ if not ALGORITHMS[name].reads_text])
def test_without_a_text_every_block_is_near_its_weights(algorithm: str, fault: str, tmp_path: Path) -> None:
    refused(algorithm, IN_A_BLOCK[fault], tmp_path)


def refused(algorithm: str, fault: faults.Fault, place: Path) -> None:
    broken = faults.plant(fault, artifact(algorithm), place / "broken")
    with pytest.raises(ArtifactError, match=r"the integers of 1\.mlp\.write do not stand for"):
        check(broken, student.student(), CheckOptions(masks=broken / "masks.safetensors", quick=True))
