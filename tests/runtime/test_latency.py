"""Times are measured over what was asked, with what another needs to measure them again; none is asserted here."""

import json
from pathlib import Path
from typing import Any

import command
import harness
import numpy as np
import onnx_ir as ir
import pytest
from artifacts import compiled

from dispc.cli.judging import dense_artifact
from dispc.compiler import CompileOptions, compile_model
from dispc.manifest import COMPARABLE, read_manifest
from dispc.masks import Masks
from dispc.quantisation import Quantisation
from dispc.runtime.bound import BoundDecoder
from dispc.runtime.latency import measure
from dispc.runtime.profile import bytes_read, shares_buffer
from dispc.runtime.providers import CPU
from dispc.runtime.session import Artifact
from dispc.support.errors import ArtifactError
from dispc.validate import LatencyOptions


@pytest.fixture(scope="module", params=["right", "left"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, checkpoint = tmp_path_factory.mktemp("latency"), harness.checkpoint("llama")
    Masks.random(checkpoint.config, 0.5, 1).save(place / "masks.safetensors", checkpoint.config)
    options = CompileOptions(
        model=checkpoint.directory,
        masks=place / "masks.safetensors",
        output=place / "out",
        target="onnx-cpu",
        padding=request.param,
        validate=False,
    )
    compile_model(options)
    return place / "out"


def test_every_case_is_timed_beside_a_dense_artifact_built_for_it(artifact: Path) -> None:
    line = ("validate", artifact, "-r", harness.checkpoint("llama").directory, "--build-dense", "--rounds", 3)
    line += ("--batch", 1, "--batch", 2, "--prompt", 8, "--past", 4, "--past", 16, "--threads", 1, "--json")
    outcome = command.run(*line)
    assert outcome.code == 0, outcome
    latency = json.loads(outcome.out)["latency"]
    assert (latency["threads"], latency["threads_chosen_by"], latency["rounds"]) == (1, "option", 3)
    names = {
        f"{kind}, batch {batch}, {where}"
        for batch in (1, 2)
        for kind, where in (("first token", "prompt 8"), ("one token", "past 4"), ("one token", "past 16"))
    }
    assert set(latency["speedup"]) == names
    for name in ("artifact", "dense"):
        rows = {row["name"]: row for row in latency["rows"] if row["artifact"] == name}
        assert set(rows) == names
        assert all(0 < row["p50"] <= row["p90"] <= row["p99"] and row["tokens_per_second"] > 0 for row in rows.values())
        assert all(("bytes_per_second" in row) == ("past" in row["name"]) for row in rows.values())
    ours, dense = (
        next(r["bytes_per_token"] for r in latency["rows"] if r["artifact"] == name and "past 4" in r["name"])
        for name in ("artifact", "dense")
    )
    assert ours < dense
    assert sum(entry["share"] for entry in latency["operators"]) == pytest.approx(1)
    assert {"MatMul", "GroupQueryAttention", "Gather"} <= {entry["operator"] for entry in latency["operators"]}
    assert 0 < latency["gather_scatter_share"] < 1
    assert latency["copy_bytes_per_second"] > 1e6
    assert latency["peak_bytes"] is None or latency["peak_bytes"] > 1e6


def test_a_past_beyond_the_model_is_refused(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"after 999 tokens, the model takes 160"):
        measure(artifact, None, LatencyOptions(pasts=(999,), prompts=(4,), rounds=1, warmup=0), CPU)
    with pytest.raises(ArtifactError, match="1 or more"):
        LatencyOptions(batches=(0,))


def test_a_measurement_that_fails_says_why_in_one_line(artifact: Path) -> None:
    model = harness.checkpoint("llama").directory
    outcome = command.run("validate", artifact, "-r", model, "--latency", "--past", 999, "--rounds", 1)
    assert outcome.code == 2
    assert "999 tokens" in outcome.err and len(outcome.err.splitlines()) == 1


def test_bytes_read_are_all_weights_but_tables_that_are_looked_up(artifact: Path) -> None:
    model = ir.load(artifact / "model.onnx")
    sizes = {name: value.const_value.nbytes for name, value in model.graph.initializers.items() if value.const_value}
    tables = ("model.embed_tokens.weight", "cos_cache", "sin_cache")
    assert bytes_read(artifact / "model.onnx") == sum(sizes.values()) - sum(sizes.get(name, 0) for name in tables)


def test_bound_decoding_says_what_unbound_decoding_says_and_repeats_itself(artifact: Path) -> None:
    loaded, tokens = Artifact(artifact), np.arange(12)[None] % 7
    expected, _ = loaded.runner.run(tokens, np.ones_like(tokens), np.arange(12)[None], loaded.runner.empty_caches(1))
    for shared in {False, shares_buffer(loaded)}:
        decoder = BoundDecoder(loaded, batch=1, capacity=16, shared=shared)
        for _ in range(2):
            decoder.reset()
            found = [decoder.feed(tokens[:, :7]), *(decoder.feed(tokens[:, at : at + 1]) for at in range(7, 12))]
            assert np.abs(np.concatenate(found, axis=1) - expected).max() < 1e-4
    with pytest.raises(ArtifactError, match="CUDA graph needs"):
        BoundDecoder(loaded, batch=1, capacity=16, shared=True, graph=True)


INT4 = Quantisation(bits=4, block_size=16, symmetric=True, head=False, embedding=False)


@pytest.mark.parametrize(
    "choices",
    [{"quantisation": INT4}, {"last_logits": True}, {"padding": "left", "without": ("fuse-qkv",)}, {"align": 8}],
)
def test_the_dense_artifact_built_for_comparison_differs_in_its_masks_alone(
    choices: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = harness.checkpoint("llama")
    ours = compiled(checkpoint, Masks.random(checkpoint.config, 0.5, 1), tmp_path, **choices)
    with dense_artifact(tmp_path / "out", checkpoint.directory, None, True) as path:
        assert path is not None
        theirs = read_manifest(path)
        with dense_artifact(tmp_path / "out", checkpoint.directory, path, False) as named:
            assert named == path
    for name in COMPARABLE:
        assert getattr(ours, name) == getattr(theirs, name)
    assert theirs.block_parameters.kept == theirs.block_parameters.dense > ours.block_parameters.kept


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"dense": True, "quantisation": INT4}, "has quantisation"),
        ({"dense": True, "padding": "left"}, "has padding left"),
        ({"dense": True, "without": ("fuse-qkv",)}, "has fusions"),
        ({}, "is pruned"),
    ],
)
def test_a_dense_artifact_of_another_kind_is_no_comparison(choices: dict[str, Any], says: str, tmp_path: Path) -> None:
    checkpoint = harness.checkpoint("llama")
    masks = tmp_path / "masks.safetensors"
    Masks.random(checkpoint.config, 0.5, 1).save(masks, checkpoint.config)
    common: dict[str, Any] = {"model": checkpoint.directory, "target": "onnx-cpu", "validate": False}
    compile_model(CompileOptions(output=tmp_path / "out", masks=masks, **common))
    compile_model(CompileOptions(output=tmp_path / "other", masks=None if choices else masks, **common, **choices))
    line = ("validate", tmp_path / "out", "-r", checkpoint.directory, "--dense", tmp_path / "other")
    command.assert_refused(tmp_path, *line, says=(says,))


@pytest.mark.parametrize(("last", "room"), [(False, [2, 7, 131]), (True, [2, 1, 131])])
def test_logits_are_bound_in_the_shape_that_the_graph_gives_them(last: bool, room: list[int], tmp_path: Path) -> None:
    """A CUDA graph writes to an address that is bound beforehand; here it is only asked for."""
    options = CompileOptions(
        model=harness.checkpoint("llama").directory,
        output=tmp_path / "out",
        target="onnx-cpu",
        dense=True,
        last_logits=last,
        validate=False,
    )
    compile_model(options)
    decoder = BoundDecoder(Artifact(tmp_path / "out"), batch=2, capacity=9, shared=True)
    assert decoder.feed(np.ones((2, 7), dtype=np.int64)).shape == tuple(room)
    assert decoder._logits((2, 7)).shape() == room
