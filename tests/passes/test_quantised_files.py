"""What a quantised artifact stores: every weight read once, every block once, and no more bytes than that."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import numpy as np
import onnx
import pytest
import torch
from quantised import EMBEDDING, EVERYTHING, quantised_model

from dispc.export.write import WORKERS, save_model
from dispc.masks import Masks
from dispc.model.weights import LazyWeight
from dispc.passes import quantise
from dispc.passes.quantise import QuantisedWeight
from dispc.quantisation import Quantisation
from dispc.runtime.session import open_session


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize("variant", ["llama-tied-biased", "opt"])
def test_a_tied_embedding_is_quantised_once_and_read_as_it_is_stored(
    variant: str, bits: int, symmetric: bool, tmp_path: Path
) -> None:
    """Two copies would hold the same bytes; the Reshape between them must be gone before the first token."""
    quantisation = Quantisation(bits=bits, block_size=16, symmetric=symmetric, head=True, embedding=True)
    masks = Masks.random(harness.checkpoint(variant).config, 0.5, 1)
    once = quantised_model(variant, masks, quantisation)
    twice = quantised_model(variant, masks, quantisation, without=("tie-embeddings",))
    assert not [name for name in once.graph.initializers if name.startswith("lm_head.weight")]
    np.testing.assert_array_equal(harness.model_logits(once), harness.model_logits(twice))
    save_model(once, tmp_path / "model.onnx")
    open_session(tmp_path / "model.onnx", optimised_model=tmp_path / "optimised.onnx")
    assert "Reshape" not in [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]


def test_a_tied_embedding_whose_rows_end_within_a_block_is_stored_twice() -> None:
    masks = Masks.random(harness.checkpoint("llama-tied-biased").config, 0.5, 1)
    graph = quantised_model("llama-tied-biased", masks, replace(EVERYTHING, block_size=32)).graph  # 48 wide
    assert {"lm_head.weight.quantised", f"{EMBEDDING}.quantised"} <= {*graph.initializers}


def test_weights_are_read_while_they_are_written_once_each_and_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[str] = []
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, made = 0, []
    honest = LazyWeight.evaluate

    def counted(self: LazyWeight, out: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal most
        value = honest(self, out)
        read.append(self.name or "")
        alive.add(value)
        most = max(most, len(alive))
        return value

    class Watched(QuantisedWeight):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(LazyWeight, "evaluate", counted)
    monkeypatch.setattr(quantise, "QuantisedWeight", Watched)
    model = quantised_model("llama", Masks.dense(harness.checkpoint("llama").config), EVERYTHING)
    assert not read
    save_model(model, tmp_path / "model.onnx")
    assert len(made) == 14  # 4 projections (two of them packed) in each of 3 blocks, LM head, embedding
    projections = [name for name in read if "_proj." in name or name in ("lm_head.weight", EMBEDDING)]
    assert len(projections) == len(set(projections)) == 23
    assert most <= WORKERS
    assert not any(weight.waiting for weight in made)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("variant", "embeddings", "without"),
    [("llama", 2, ()), ("llama-tied-biased", 1, ()), ("llama-tied-biased", 2, ("tie-embeddings",))],
)
def test_the_file_shrinks_to_the_bits_and_their_scales(
    variant: str, embeddings: int, without: tuple[str, ...], bits: int, tmp_path: Path
) -> None:
    quantisation = Quantisation(bits=bits, block_size=16, symmetric=True, head=True, embedding=True)
    config = harness.checkpoint(variant).config
    model = quantised_model(variant, Masks.dense(config), quantisation, without=without)
    save_model(model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = sum(len(t.raw_data) for t in graph.initializer if t.name.endswith((".quantised", ".scales")))
    weights = config.block_parameters * config.num_hidden_layers + embeddings * config.vocab_size * config.hidden_size
    padded = config.hidden_size * (-config.intermediate_size % 16) * config.num_hidden_layers  # down_proj's last blocks
    assert stored == (weights + padded) * (bits + 32 / 16) / 8
