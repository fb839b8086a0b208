"""--verify-each: run the model after every pass and name the first pass that changed the result.

Up to the unrolled graph the result must be the dense reference's, from the pruned graph on the masked reference's, and
after quantisation that of the masked reference with its weights rounded likewise.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from dispc.manifest import WEIGHTS
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.weights import surface_weight_errors
from dispc.quantisation import Quantisation
from dispc.reference.masked import load_reference, mask_forward
from dispc.reference.quantised import quantise_reference, read_integers
from dispc.reference.truth import freed
from dispc.runtime.session import Runner, open_session
from dispc.support.arrays import Array
from dispc.support.errors import CompileError
from dispc.support.signals import hold_signals
from dispc.validate.checks.parity import LIMITS, logit_error

SPLIT = 6
DENSE_PASSES = ("unroll",)
QUANTISING_PASS = "quantise"


def make_verifier(
    checkpoint: Checkpoint, masks: Masks, quantisation: Quantisation | None = None, *, seed: int = 0
) -> Callable[[int, str, ir.Model], None]:
    """A callback for `run_pipeline` that raises CompileError naming the pass whose graph computes something else.

    Runs in float32 without ONNX Runtime's own optimisations: a prefill, and a second run after its cache.
    """
    tokens = np.random.default_rng(seed).integers(0, checkpoint.config.vocab_size, 10)
    with freed(load_reference(checkpoint, None)) as model:  # only its answers are needed while the passes run
        dense = _reference_logits(model, tokens)
        mask_forward(model, checkpoint.family, masks)
        masked = _reference_logits(model, tokens)
    answers = {"after": masked}  # what the passes after the dense ones must give; quantisation changes it

    def verify(number: int, name: str, graph: ir.Model) -> None:
        if name == QUANTISING_PASS and quantisation:
            with freed(load_reference(checkpoint, masks)) as model:
                integers = read_integers(quantisation, lambda: graph, checkpoint.family)
                quantise_reference(model, checkpoint.family, masks, quantisation, torch.float32, integers)
                answers["after"] = _reference_logits(model, tokens)
        logits, positions = _run(graph, tokens)
        expected = dense if name in DENSE_PASSES else answers["after"]
        error = logit_error(logits, expected[positions])
        if not error <= LIMITS["float32"]:
            raise CompileError(
                f"pass {number:02d} {name} changed the result: logits are off by {error:.2e} of their range "
                f"(allowed {LIMITS['float32']:.0e}); --dump-ir DIR shows the graphs"
            )

    return verify


def _reference_logits(model: torch.nn.Module, tokens: Array) -> Array:
    with torch.inference_mode():
        logits: Array = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    return logits


def _run(graph: ir.Model, tokens: Array) -> tuple[Array, list[int]]:
    """Logits [S,V] of `tokens` and their positions (all, or the last of each run): SPLIT tokens, then the rest."""
    with tempfile.TemporaryDirectory(prefix="dispc-verify-") as scratch:
        path = Path(scratch) / "model.onnx"
        with hold_signals(), surface_weight_errors():
            ir.save(graph, path, external_data=WEIGHTS, max_workers=2)
        runner = Runner(open_session(path, optimise=False))
    caches, pieces, seen = runner.empty_caches(1), [], list[int]()
    for start, end in ((0, SPLIT), (SPLIT, len(tokens))):
        positions = np.arange(start, end)[None]
        logits, caches = runner.run(tokens[None, start:end], np.ones((1, end), dtype=np.int64), positions, caches)
        pieces.append(logits[0])
        seen += range(start, end)[-logits.shape[1] :]
    return np.concatenate(pieces), seen
