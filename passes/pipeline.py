"""Which passes run for a plan, in order; and how a list of passes is run, timed and watched."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dispc.manifest import PassRecord
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.passes.base import RewritePass
from dispc.passes.common.fold_multipliers import FoldMultipliersPass
from dispc.passes.common.unroll import UnrollPass
from dispc.passes.fuse.fuse_activations import FuseActivationsPass
from dispc.passes.fuse.fuse_gate_up import FuseGateUpPass
from dispc.passes.fuse.fuse_qkv import FuseQkvPass
from dispc.passes.fuse.fuse_rotary import FuseRotaryPass
from dispc.passes.fuse.fuse_skip_norm import FuseSkipNormPass
from dispc.passes.fuse.tie_embeddings import TieEmbeddingsPass
from dispc.passes.lower.last_logits import LastLogitsPass
from dispc.passes.lower.lower_attention import LowerAttentionPass
from dispc.passes.lower.lower_opset import LowerOpsetPass
from dispc.passes.lower.selection import find_pass
from dispc.passes.prune.align_widths import AlignWidthsPass
from dispc.passes.prune.fill_zeros import FillZerosPass
from dispc.passes.prune.prune_blocks import PruneBlocksPass
from dispc.passes.quantise import QuantisePass
from dispc.plan import Plan
from dispc.selection import fill_sets, sets_to_fill

Hessians = Mapping[str, npt.NDArray[np.float32]]
"""Product -> sum of x x^T over its inputs x, [K,K]."""


def build_pipeline(
    plan: Plan, checkpoint: Checkpoint, masks: Masks, hessians: Hessians | None = None
) -> list[RewritePass]:
    """The passes from the traced graph to the target's graph; `hessians` of the products are for GPTQ."""
    config, target = checkpoint.config, plan.target
    multiple = max(target.write_multiple, plan.align)
    quantisation = plan.quantisation
    tied = config.tied and "tie-embeddings" in plan.fusions
    apart = quantisation is not None and (quantisation.head or quantisation.embedding)  # QuantisePass ties what it can
    embedding = config.family.embedding
    filled = sets_to_fill(masks, config, plan.costs) if plan.fills else frozenset[tuple[int, str]]()
    left = fill_sets(masks, filled)  # the sets that are left to be selected
    rows: tuple[tuple[bool, Callable[[], RewritePass]], ...] = (
        (True, lambda: UnrollPass(checkpoint)),
        (
            config.residual_multiplier != 1 or config.logits_multiplier != 1,
            lambda: FoldMultipliersPass(config),
        ),
        (True, lambda: PruneBlocksPass(config, masks)),
        (plan.align > 1, lambda: AlignWidthsPass(config, masks, plan.align)),
        (plan.fills, lambda: FillZerosPass(config, masks, plan.costs)),
        *((True, partial(find_pass(name), left, multiple)) for name in plan.lowering.passes),
        (plan.group_query, lambda: LowerAttentionPass(plan.padding, config, masks)),
        (
            plan.group_query and plan.padding == "right" and "fuse-rotary" in plan.fusions,
            lambda: FuseRotaryPass(config, masks),
        ),
        (plan.group_query and "fuse-qkv" in plan.fusions, lambda: FuseQkvPass(config, masks)),
        ("fuse-gate-up" in plan.fusions, lambda: FuseGateUpPass(config, masks)),
        ("fuse-activations" in plan.fusions, lambda: FuseActivationsPass()),
        ("fuse-skip-norm" in plan.fusions, lambda: FuseSkipNormPass(config, left, adds=plan.lowering.adds)),
        (
            tied and not apart,
            lambda: TieEmbeddingsPass(embedding, contrib=target.contrib),
        ),
        (plan.last_logits, lambda: LastLogitsPass(plan.padding)),
        *([(True, lambda: QuantisePass(quantisation, config, tied=tied, hessians=hessians))] if quantisation else []),
        # last: it sees what the others have made
        (True, lambda: LowerOpsetPass(respell=plan.group_query, rotations=target.rotates_apart)),
    )
    return [make() for wanted, make in rows if wanted]


def run_pipeline(
    model: ir.Model,
    passes: Sequence[RewritePass],
    after: Callable[[int, str, ir.Model], None] = lambda number, name, model: None,
) -> list[PassRecord]:
    """Run `passes` in order; `after(number, name, model)` sees the graph after each of them."""
    # A collection walks everything that torch has imported, and costs as much as a pass; passes make little garbage.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _run(model, passes, after)
    finally:
        if collecting:
            gc.enable()


def _run(
    model: ir.Model, passes: Sequence[RewritePass], after: Callable[[int, str, ir.Model], None]
) -> list[PassRecord]:
    records = []
    for number, rewrite in enumerate(passes, start=1):
        nodes_before, start = model.graph.num_nodes(), time.perf_counter()
        rewrite(model)
        records.append(
            PassRecord(
                name=rewrite.name,
                options=rewrite.options,
                rewrites=rewrite.count,
                nodes_before=nodes_before,
                nodes_after=model.graph.num_nodes(),
                seconds=round(time.perf_counter() - start, 4),
                left=tuple(rewrite.left),
            )
        )
        after(number, rewrite.name, model)
    return records


def pipeline_line(passes: Sequence[RewritePass]) -> str:
    """The passes with their options in one line, as stored in dispc.json and the model's metadata."""
    return " ".join(map(str, passes))
