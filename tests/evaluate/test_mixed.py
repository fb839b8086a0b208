"""Which products keep 8 bits, by the loss that each adds."""

import harness
import numpy as np
import pytest
import torch

from dispc.evaluate.mixed import _Text
from dispc.masks import Masks
from dispc.reference.blocks import Blocks
from dispc.reference.masked import load_reference


@pytest.mark.parametrize("variant", ["llama", "phi", "gemma2"])
@torch.no_grad()
def test_a_loss_with_blocks_run_again_is_that_of_the_whole_model(variant: str) -> None:
    """Whichever block changes: what was kept of those before it is what they still give."""
    checkpoint = harness.checkpoint(variant)
    config = checkpoint.config
    model = load_reference(checkpoint, Masks.random(config, 0.3, 1))
    blocks, tokens = Blocks(model, config), np.random.default_rng(0).integers(0, config.vocab_size, 24)
    text = _Text(blocks, tokens)
    for index in reversed(range(config.num_hidden_layers)):
        for parameter in model.get_submodule(config.family.block(index)).parameters():
            parameter.mul_(1.1)
        found = text.loss(index)
        for block, forward in zip(blocks.blocks, blocks.forwards, strict=True):
            block.forward = forward
        ids = torch.from_numpy(tokens)[None]
        assert found == pytest.approx(float(model(input_ids=ids, labels=ids, use_cache=False).loss), rel=1e-5)
