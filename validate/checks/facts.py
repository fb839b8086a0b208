"""The facts in dispc.json, computed again from the graph, the masks and the reference."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from dispc.lowerings import LOWERINGS
from dispc.manifest import IN_GRAPH, Manifest
from dispc.masks import Masks
from dispc.support.dtypes import DTYPES
from dispc.support.errors import DispcError
from dispc.support.graph import LAST
from dispc.support.typed_json import to_json
from dispc.support.version import __version__
from dispc.validate.checks.check import Check, listed
from dispc.validate.checks.files import differences
from dispc.validate.comparison import Comparison

NAME = "dispc.json"
SCATTERS = {row.name: row.writes_by for row in LOWERINGS.values() if not row.adds}
"""Lowering -> the operator that it writes by; the others have none of these."""
SURELY_SCATTERED = 0.8
"""A write set that keeps less than this share is never filled up with zeros instead."""
OF_REPORT = ("target", "dtype", "padding", "lowering", "bytes", "widths", "full_widths")
"""Facts of the artifact that a stored validation repeats."""


def judge_facts(comparison: Comparison, quick: Collection[str]) -> Iterator[Check]:
    """Every fact that can be computed again is; the stored validation fits the artifact and its own figures, and holds
    the `quick` checks."""
    try:
        graph = comparison.graph()
        expected = recomputed(comparison, graph)
    except DispcError as error:
        yield Check.failed(NAME, "static", str(error))
        return
    content = comparison.manifest.to_json()
    stored = {name: content[name] for name in expected}
    faults = [f"{place} is {ours}, it should be {theirs}" for place, ours, theirs in differences(stored, expected)]
    faults += _metadata(comparison.manifest, graph, comparison.masks)
    if comparison.manifest.validation is not None:
        faults += _validation(comparison.manifest.validation, comparison, quick)
    if faults:
        yield Check.failed(NAME, "static", listed(faults))
    else:
        yield Check(name=NAME, group="static", status="passed", detail=f"{len(expected)} facts worked out again")


def recomputed(comparison: Comparison, graph: ir.Model) -> dict[str, Any]:
    """The facts of dispc.json, by name, from everything else, and those that follow from choices there.

    Raises:
        DispcError: when the choices are none that a compilation takes.
    """
    plan, lowering = comparison.plan, comparison.manifest.lowering
    checkpoint, masks, config = comparison.checkpoint, comparison.masks, comparison.checkpoint.config
    operators = Counter(node.op_type for node in graph.graph)
    attends = any(block.attention.alive for block in masks.blocks)  # else no operator shows what it would be
    grouped = bool(operators["GroupQueryAttention"]) if attends else plan.group_query
    dense = config.all_block_parameters
    logits = next(value for value in graph.graph.outputs if value.name == "logits")
    facts: dict[str, Any] = {
        "model_type": config.family.model_type,
        "dtype": next((name for name, row in DTYPES.items() if row.onnx == logits.dtype), "unknown"),
        "logits": "last" if any((node.name or "").startswith(LAST) for node in graph.graph) else "all",
        "attention": "GroupQueryAttention" if grouped else "Attention",
        "positions": config.max_positions,
        "stop_tokens": checkpoint.stop_tokens,
        "norm_scope": masks.norm_scope,
        "block_parameters": {"dense": dense, "kept": masks.kept_parameters(config)},
        "cache_layers": masks.cache_layers,
        "widths": [{name: len(indices) for name, indices in block.sets().items()} for block in masks.blocks],
        "lowering": to_json(replace(lowering, filled=plan.filled(masks, config))),
        "cuda_graph": plan.cuda_graph,
        "fusions": list(plan.fusions),
        "nodes": len(graph.graph),
        "bytes": sum(file.stat().st_size for file in comparison.directory.glob("model.onnx*")),
    }
    return facts


def _metadata(manifest: Manifest, graph: ir.Model, masks: Masks) -> Iterator[str]:
    """The metadata of model.onnx, and the lowering that its operators show."""
    for name, key in IN_GRAPH.items():
        ours, in_graph = getattr(manifest, name), graph.metadata_props.get(key)
        if in_graph != ours:
            yield f"{name} is {ours}, model.onnx says {in_graph or 'nothing'}"
    for key in sorted(set(graph.metadata_props) - set(IN_GRAPH.values())):
        yield f"model.onnx has metadata of its own: {key}"  # ONNX Runtime reads options of sessions from some
    if manifest.needs.opset != graph.opset_imports[""]:
        yield f"needs.opset is {manifest.needs.opset}, model.onnx has {graph.opset_imports['']}"
    operators, lowering = Counter(node.op_type for node in graph.graph), manifest.lowering.name
    parts = [part for block in masks.blocks for part in block.sub_layers.values() if part.alive]
    scattered = any(len(part.write) < SURELY_SCATTERED * masks.hidden_size for part in parts)
    meant = SCATTERS.get(lowering)
    if scattered and meant and not operators[meant]:
        yield f"lowering is {lowering}, model.onnx has no {meant}"
    for operator in sorted(set(SCATTERS.values()) - {meant}):
        if operators[operator]:
            names = " or ".join(name for name, writes_by in SCATTERS.items() if writes_by == operator)
            yield f"lowering is {lowering}, model.onnx has {operator} ({names})"


def _validation(stored: Any, comparison: Comparison, quick: Collection[str]) -> Iterator[str]:
    """Contradictions between a stored report and this artifact, or its own figures."""
    if not isinstance(stored, Mapping) or not isinstance(stored.get("checks"), list):
        yield "validation is no report"
        return
    facts = comparison.facts()
    expected = {name: facts[name] for name in OF_REPORT} | {"widths": list(facts["widths"])}
    for place, ours, theirs in differences({name: stored.get(name) for name in expected}, expected):
        yield f"validation.{place} is {ours}, it should be {theirs}"
    failed = False
    for check in stored["checks"]:
        if not isinstance(check, Mapping) or not isinstance(check.get("name"), str):
            yield "validation.checks holds something that is no check"
            return
        figure, limit, status = (check.get(name) for name in ("figure", "limit", "status"))
        failed |= status == "failed"
        over = limit is not None and not (isinstance(figure, int | float) and figure <= limit)
        if status == "passed" and over:
            yield f"validation: {check['name']} has passed with {figure} against a limit of {limit}"
    if stored.get("passed") is not True or failed:
        yield "validation: the artifact did not pass when it was made"
    if comparison.manifest.dispc == __version__:
        missing = {name for name in quick if name not in {check["name"] for check in stored["checks"]}}
        if missing:
            yield f"validation lacks the check {min(missing)}"
