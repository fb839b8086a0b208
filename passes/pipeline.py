"""Which passes run for a plan, in order; and how a list of passes is run, timed and watched."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from dispc.checkpoint import Checkpoint
from dispc.masks import Masks
from dispc.passes.base import RewritePass
from dispc.passes.lower_attention import LowerAttentionPass
from dispc.passes.lower_scatter import LowerScatterPass
from dispc.passes.prune_blocks import PruneBlocksPass
from dispc.passes.quantise import QuantisePass
from dispc.passes.unroll import UnrollPass
from dispc.targets import Plan


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass did: rewrites made, nodes before and after, seconds."""

    name: str
    rewrites: int
    nodes_before: int
    nodes_after: int
    seconds: float


def build_pipeline(plan: Plan, checkpoint: Checkpoint, masks: Masks) -> list[RewritePass]:
    """The passes from the traced graph to the target's graph."""
    config = checkpoint.config
    passes: list[RewritePass] = [UnrollPass(checkpoint), PruneBlocksPass(config, masks)]
    if plan.lowering == "inverse-gather":
        passes.append(LowerScatterPass(config.hidden_size))
    if plan.group_query:
        passes.append(LowerAttentionPass(plan.padding, config.head_dim))
    if plan.quantisation:
        passes.append(QuantisePass(plan.quantisation, f"{config.family.embedding}.weight"))
    return passes


def run_pipeline(
    model: ir.Model,
    passes: Sequence[RewritePass],
    after: Callable[[int, str, ir.Model], None] = lambda number, name, model: None,
) -> list[PassRecord]:
    """Run `passes` in order; `after(number, name, model)` sees the graph behind each of them."""
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
                rewrites=rewrite.count,
                nodes_before=nodes_before,
                nodes_after=model.graph.num_nodes(),
                seconds=round(time.perf_counter() - start, 4),
            )
        )
        after(number, rewrite.name, model)
    return records


def pipeline_line(passes: Sequence[RewritePass]) -> str:
    """The pipeline in one line, as stored in dispc.json and the model's metadata."""
    return " ".join(rewrite.name for rewrite in passes)
