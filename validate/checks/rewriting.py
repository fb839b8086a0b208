"""The graph that dispc writes for what an artifact was made of, written again: it alone has the passes run.

Everything else in validation judges what is computed without them.
"""

from dataclasses import asdict
from weakref import WeakKeyDictionary

import onnx_ir as ir

from dispc.export.trace import trace
from dispc.manifest import IN_GRAPH
from dispc.passes.common.versions import needs
from dispc.passes.pipeline import build_pipeline, pipeline_line, run_pipeline
from dispc.support.dtypes import DTYPES
from dispc.support.version import COMPILING, __version__, versions
from dispc.validate.checks.check import Check
from dispc.validate.comparison import Comparison

PASSES = IN_GRAPH["pipeline"]
"""Metadata key of the passes that made a graph, with their options."""
WRITTEN: WeakKeyDictionary[Comparison, ir.Model] = WeakKeyDictionary()
"""What several checks need is written once."""


def rewritten(comparison: Comparison) -> ir.Model:
    """The graph for the model, the masks and the choices that the artifact was compiled with; its weights are lazy.

    Raises:
        DispcError: when these choices cannot be compiled.
    """
    if comparison not in WRITTEN:
        plan = comparison.plan
        model = trace(comparison.checkpoint, DTYPES[plan.dtype].torch)
        passes = build_pipeline(plan, comparison.checkpoint, comparison.masks)
        run_pipeline(model, passes)
        model.metadata_props[PASSES] = pipeline_line(passes)
        WRITTEN[comparison] = model
    return WRITTEN[comparison]


def needed(graph: ir.Model) -> dict[str, object]:
    """What runs a graph, as dispc.json has it: by the passes' own table of kernels."""
    return asdict(needs(graph))


def other_releases(comparison: Comparison) -> str:
    """The releases that the artifact was made with and that are others here, in words; empty where there are none."""
    made = dict(comparison.manifest.versions) | {"dispc": comparison.manifest.dispc}
    here = {"dispc": __version__} | versions(*COMPILING)
    return ", ".join(
        f"{name} {made[name]}, here {version}" for name, version in here.items() if made.get(name, version) != version
    )


def failed_or_noted(name: str, what: str, comparison: Comparison) -> Check:
    """The check of an artifact that is otherwise than what is written here: noted where other releases made it."""
    if others := other_releases(comparison):
        return Check(name=name, group="static", status="noted", detail=f"not judged (compiled with {others}): {what}")
    return Check.failed(name, "static", what)
