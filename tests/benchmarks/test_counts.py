"""The models that are timed compute what the reference computes; bytes and operations are counted right."""

from pathlib import Path
from typing import Any

import harness
import numpy as np
import onnx_ir as ir
import prefill
import pytest
import torch
from algorithm1 import Algorithm1
from common import median_ratio
from decoder import Decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from learned_like import learned_like
from make_checkpoint import make_checkpoint, write_tokenizer
from measured import compiled, decoder_config, some_masks

from dispc.masks import Masks
from dispc.validate.checks.parity import LIMITS, logit_error


def logits_in_two_runs(model: Any, tokens: Any) -> Any:
    """Logits [S,V] of a prompt and, after it, of one token."""
    model.allocate(1, len(tokens) + 3)
    found = []
    for part, past in ((tokens[:-1], 0), (tokens[-1:], len(tokens) - 1)):
        step = model.bind(part[None], past)
        step.run()
        found.append(step.logits()[0])
    return np.concatenate(found)


@pytest.mark.parametrize("norm_scope", ["full", "selected"])
@pytest.mark.parametrize("variant", ["llama", "llama3-rope"])
def test_algorithm_1_computes_what_the_reference_computes(variant: str, norm_scope: Any) -> None:
    masks = some_masks(variant, norm_scope)
    found = logits_in_two_runs(Algorithm1(harness.checkpoint(variant), masks, torch.float32, "cpu"), harness.TOKENS)
    assert logit_error(found, harness.reference_logits(variant, masks)) < LIMITS["float32"]


def test_algorithm_1_refuses_what_it_does_not_compute() -> None:
    for variant in ("llama-tied-biased", "qwen2", "opt"):
        checkpoint = harness.checkpoint(variant)
        with pytest.raises(ValueError, match="LLaMA models without biases"):
            Algorithm1(checkpoint, Masks.dense(checkpoint.config), torch.float32, "cpu")


def test_a_decoder_with_shared_buffers_computes_what_the_reference_computes(tmp_path: Path) -> None:
    masks = some_masks("llama")
    model = Decoder(compiled("llama", masks, tmp_path), harness.checkpoint("llama").config, threads=1)
    found = logits_in_two_runs(model, harness.TOKENS)
    assert logit_error(found, harness.reference_logits("llama", masks)) < LIMITS["float32"]


def test_bytes_read_are_all_weights_once_a_row_of_tables_and_the_caches(tmp_path: Path) -> None:
    config = harness.checkpoint("llama").config
    model = Decoder(compiled("llama", None, tmp_path), config, threads=1)
    stored = {name: value.const_value for name, value in ir.load(model.path).graph.initializers.items()}
    sizes = {name: tensor.nbytes for name, tensor in stored.items() if tensor is not None}
    tables = [name for name in sizes if "embed_tokens" in name or name in ("cos_cache", "sin_cache")]
    weights = 4 * (config.block_parameters * config.num_hidden_layers + config.vocab_size * config.hidden_size)
    norms = 4 * (2 * config.num_hidden_layers + 1) * config.hidden_size
    cache = 4 * 2 * config.num_hidden_layers * config.key_value_size
    row = 4 * config.hidden_size
    found = [model.bytes_read(batch, past) for batch, past in ((1, 0), (1, 7), (3, 7))]
    assert found[1] - found[0] == 7 * cache
    assert weights + norms + row <= found[0] <= weights + norms + row + 2**13  # the rest: rows of cosines, constants
    assert row + 7 * cache <= (found[2] - found[1]) / 2 <= row + 7 * cache + 2**13
    assert sum(sizes[name] for name in tables) > 2**14  # so that the upper bounds say something


def test_pytorch_reads_as_many_bytes_as_the_dense_artifact(tmp_path: Path) -> None:
    checkpoint = harness.checkpoint("llama")
    onnx = Decoder(compiled("llama", None, tmp_path), checkpoint.config, threads=1).bytes_read(2, 9)
    pytorch = Algorithm1(checkpoint, Masks.dense(checkpoint.config), torch.float32, "cpu").bytes_read(2, 9)
    assert pytorch <= onnx <= 1.05 * pytorch


def test_operations_of_a_prompt_are_those_of_its_matrices() -> None:
    config = decoder_config("tiny")
    dense = Masks.dense(config)
    weights = config.block_parameters * config.num_hidden_layers + config.vocab_size * config.hidden_size
    one, two = (prefill.operations(config, dense, length, last_logits=False) for length in (1, 2))
    assert one == 2 * weights + 4 * config.num_hidden_layers * config.query_size
    assert two - 2 * one == 4 * config.num_hidden_layers * config.query_size  # one pair of positions more
    head = 2 * config.vocab_size * config.hidden_size
    assert two - prefill.operations(config, dense, 2, last_logits=True) == head


@settings(max_examples=8)
@given(
    shape=st.sampled_from(["llama-2-7b", "llama-2-13b"]),
    kept=st.sampled_from([0.5, 0.6, 0.7, 0.8]),
    seed=st.integers(0, 1000),
)
def test_learned_like_widths_meet_the_budget_and_are_uneven(shape: str, kept: float, seed: int) -> None:
    config = decoder_config(shape)
    masks = learned_like(config, kept, seed)
    total = config.block_parameters * config.num_hidden_layers
    assert masks.kept_parameters(config) == pytest.approx(kept * total, rel=1e-3)
    shares: dict[str, list[float]] = {name: [] for name in masks.blocks[0].sets()}
    for block in masks.blocks:
        for name, indices in block.sets().items():
            full = config.intermediate_size if name == "mlp.mid" else config.hidden_size
            shares[name].append(len(indices) / full)
    for name, values in shares.items():
        assert len(set(values)) == len(values), name
    assert max(shares["mlp.mid"]) < min(shares["mlp.read"] + shares["mlp.write"])
    late = shares["attention.read"][config.num_hidden_layers // 2 :]
    assert sorted(late)[3] < min(shares["attention.read"][: config.num_hidden_layers // 2])  # several nearly vanish


def test_ratios_are_taken_round_by_round() -> None:
    assert median_ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0  # the second round was slow for both


def test_the_tokenizer_of_a_made_checkpoint_loads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_checkpoint(tmp_path, "tiny")
    write_tokenizer(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("<s> word </s>")["input_ids"] == [1, 0, 2]
