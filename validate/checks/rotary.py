"""The cosines and sines that an artifact stores, against those of transformers, at every position the model has.

The scenarios reach the last positions only where the context is short or the artifact takes position_ids.
"""

from functools import partial
from typing import Any

import numpy as np
import torch

from dispc.model.checkpoint import Checkpoint
from dispc.model.pretrained import build_model
from dispc.runtime.edits import load_graph
from dispc.runtime.session import Artifact
from dispc.support.check import Check
from dispc.support.dtypes import DTYPES

TABLES = ("cos_cache", "sin_cache")
UNITS = 2.0
"""Units in the last place of the stored dtype that a cosine may be off."""


def judge_rotary(artifact: Artifact, checkpoint: Checkpoint) -> Check:
    """Largest difference of both tables [positions, rotary dimensions / 2], in units of the stored dtype at 1."""
    check = partial(Check.skipped, "rotary tables", "parity")
    initializers = load_graph(artifact.directory / "model.onnx").graph.initializers
    stored = [initializers[name].const_value for name in TABLES if name in initializers]
    if not stored:
        return check("the graph has none")
    rotary = rotary_module(checkpoint)
    if rotary is None:
        return Check.failed("rotary tables", "parity", "the graph has them, the reference has no rotary positions")
    dtype, worst, where = DTYPES[artifact.dtype].torch, 0.0, ""
    for name, tensor, expected in zip(TABLES, stored, rotary_tables(rotary, artifact.positions), strict=True):
        assert tensor is not None
        found = torch.from_numpy(tensor.numpy().astype(np.float32))
        if found.shape != (artifact.positions, expected.shape[1] // 2):
            return Check.failed("rotary tables", "parity", f"{name} is {list(found.shape)}")
        error = (found - expected[:, : found.shape[1]].to(dtype).float()).abs().nan_to_num(float("inf")).amax(dim=1)
        if float(error.max()) > worst:
            worst, where = float(error.max()), f"; worst at position {int(error.argmax())} of {name}"
    detail = f"{artifact.positions:,} positions{where}"
    return Check.against(
        "rotary tables", "parity", worst / torch.finfo(dtype).eps, UNITS, "units in the last place", detail
    )


def rotary_module(checkpoint: Checkpoint) -> Any:
    """transformers' own module that makes cosines and sines, in float32; None where the model has none."""
    config = checkpoint.pretrained_config
    with torch.device("meta"):
        model = build_model(config, torch.float32, checkpoint.family.attention)
    module = next((m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    return None if module is None else type(module)(config)


@torch.no_grad()
def rotary_tables(rotary: Any, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, float32 [positions, rotary dimensions].

    On one thread: with several, a first call of torch was once seen to give cosines that are off by 1e-4.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cos, sin = rotary(torch.zeros(1), torch.arange(positions)[None])
    finally:
        torch.set_num_threads(threads)
    return cos[0], sin[0]
