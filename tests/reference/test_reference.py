"""The reference against the paper's Algorithm 1 written with index selection, and its special cases."""

from typing import Any

import harness
import numpy as np
import pytest
import torch
from torch import Tensor

from dispc.masks import Masks
from dispc.reference.masked import load_reference


def select(linear: Any, rows: Any = None, columns: Any = None) -> tuple[Tensor, Tensor | None]:
    """Rows (outputs) and columns (inputs) of a linear layer, as `nn.functional.linear` takes them."""
    weight, bias = linear.weight, linear.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return weight if columns is None else weight[:, columns], bias


@pytest.mark.parametrize("norm_scope", ["full", "selected"])
def test_a_masked_mlp_equals_index_select_narrow_layers_and_index_add(norm_scope: Any) -> None:
    variant = "opt"
    checkpoint = harness.checkpoint(variant)
    config, family = checkpoint.config, checkpoint.family
    masks = Masks.random(config, 0.5, 11, norm_scope=norm_scope)
    sets = masks.blocks[1].mlp
    read, mid, write = (torch.from_numpy(s) for s in (sets.read, sets.mid, sets.write) if s is not None)
    masked = load_reference(checkpoint, masks).get_submodule(family.block(1))
    dense = load_reference(checkpoint, None).get_submodule(family.block(1))
    x = torch.randn(3, 5, config.hidden_size)

    norm = dense.final_layer_norm
    if norm_scope == "selected":
        h = torch.nn.functional.layer_norm(x[..., read], (len(read),), norm.weight[read], norm.bias[read], norm.eps)
    else:
        h = norm(x)[..., read]
    h = torch.relu(torch.nn.functional.linear(h, *select(dense.fc1, mid, read)))
    h = torch.nn.functional.linear(h, *select(dense.fc2, write, mid))
    expected = torch.zeros_like(x).index_add(-1, write, h)

    found = masked.fc2(torch.relu(masked.fc1(masked.final_layer_norm(x))))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["llama", "phi", "opt"])
@pytest.mark.parametrize("norm_scope", ["full", "selected"])
def test_full_sets_are_the_dense_model(variant: str, norm_scope: Any) -> None:
    config = harness.checkpoint(variant).config
    masks = Masks.from_indices([{}] * config.num_hidden_layers, config, norm_scope=norm_scope)
    np.testing.assert_allclose(
        harness.reference_logits(variant, masks), harness.reference_logits(variant, None), atol=2e-5
    )


def test_the_two_norm_scopes_are_different_functions() -> None:
    config = harness.checkpoint("llama").config
    full, selected = (
        harness.reference_logits("llama", Masks.random(config, 0.5, 1, norm_scope=scope))
        for scope in ("full", "selected")
    )
    assert np.abs(full - selected).max() > 0.1


@pytest.mark.parametrize("variant", ["llama-tied-biased", "phi", "opt"])
def test_a_sub_layer_with_an_empty_set_adds_nothing_not_even_its_bias(variant: str) -> None:
    config = harness.checkpoint(variant).config
    by_read, by_write = (
        harness.reference_logits(variant, Masks.from_indices([{name: []}, {}, {}], config))
        for name in ("attention.read", "attention.write")
    )
    np.testing.assert_array_equal(by_read, by_write)
