"""Where an artifact goes wrong: the residual stream behind every sub-layer, against the reference's.

Sub-layers talk to each other through the stream alone, so the first place at which it is off by more than its budget
is the first sub-layer that computes something else.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from dispc.masks import Masks
from dispc.reference.truth import Answers
from dispc.runtime.session import Artifact
from dispc.support.errors import ArtifactError
from dispc.support.graph import EXTRACTOR, consumers
from dispc.validate.checks.parity import distance
from dispc.validate.checks.scenarios import Row, Scenario, Stage

NORMS = ("RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization")
SKIP_NORMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
SHOWN = 6
"""Dimensions of the stream that a report names."""


def find_streams(model: ir.Model) -> list[ir.Value]:
    """The residual stream in front of the first sub-layer, and behind each one, in order.

    Followed through the graph, whatever nodes are called: a stream enters a norm (or the Gather of a selected norm) and
    an Add, a ScatterElements, a ScatterND between two Transposes, or the fourth output of a norm fused with the add.

    Raises:
        ArtifactError: when the stream cannot be followed to its end.
    """
    streams = [first_stream(model)]
    while (following := _next(streams[-1])) is not None:
        streams.append(following)
    return streams


def first_stream(model: ir.Model) -> ir.Value:
    """The residual stream in front of the first sub-layer: what the embeddings are.

    Raises:
        ArtifactError: when it cannot be found.
    """
    first = next((node for node in model.graph if node.op_type in (*NORMS, *SKIP_NORMS)), None)
    if first is None:
        raise ArtifactError("the graph has no norm, so its residual stream cannot be found")
    if first.op_type in SKIP_NORMS:  # the first sub-layer's write is fused into the next norm
        raise ArtifactError(f"{first.name}: fused with something in front of the first block")
    return _source(first.inputs[0])


def _source(value: ir.Value | None) -> ir.Value:
    """In front of the selection of a norm over the read set."""
    assert value is not None
    producer = value.producer()
    if producer is not None and (producer.name or "").endswith(("/read/Gather", f"/read/{EXTRACTOR}")):
        return _source(producer.inputs[0])
    return value


def _next(stream: ir.Value) -> ir.Value | None:
    """What becomes of `stream` when the next sub-layer has been added; None at the end."""
    for node in consumers(stream):
        if node.op_type in ("Add", "ScatterElements"):
            return node.outputs[0]
        if node.op_type in SKIP_NORMS:
            if len(node.outputs) < 4:
                node.resize_outputs(4)
            for number, value in enumerate(node.outputs):  # a name of nothing is how ONNX leaves an output out
                value.name = value.name or (f"{node.name}_output_3" if number == 3 else "")
            return node.outputs[3]
        if node.op_type == "Transpose":
            scatter = next((n for n in consumers(node.outputs[0]) if n.op_type == "ScatterND"), None)
            if scatter is not None:
                return consumers(scatter.outputs[0])[0].outputs[0]
    return None


def expose(model: ir.Model) -> None:
    """Make every stream an output called `stream.N`, in place."""
    streams = find_streams(model)
    dtype = next(value.dtype for value in model.graph.outputs if value.name == "logits")
    assert dtype is not None
    for number, value in enumerate(streams):
        out = ir.Value(name=f"stream.{number}", shape=ir.Shape(["batch", "sequence", None]))
        out.dtype = dtype
        model.graph.append(ir.node("Identity", [value], name=f"stream.{number}", outputs=[out]))
        model.graph.outputs.append(out)


def drill_down(
    stage: Stage, scenario: Scenario, masks: Masks, answer: Callable[..., Answers], limit: float
) -> dict[str, Any]:
    """Play `scenario` again with all streams exposed, and find the first sub-layer over its budget.

    Returns the `verdict` (None: no sub-layer is over it), the `scenario`, and one entry of `stages` for the embedding,
    each living sub-layer and the logits: `name`, `error`, `own_error`, `ratio`, and for sub-layers their widths and the
    worst dimensions. Where the streams cannot be had, there are no stages and the verdict says why.
    """
    try:
        return _drill_down(stage, scenario, masks, answer, limit)
    except ArtifactError as error:  # the checks have failed already, or not: that must not be lost
        return {"verdict": f"no drill: {error}", "scenario": scenario.name, "limit": limit, "stages": []}


def _drill_down(
    stage: Stage, scenario: Scenario, masks: Masks, answer: Callable[..., Answers], limit: float
) -> dict[str, Any]:
    directory = stage.artifact.directory
    artifact = Artifact(directory, provider=stage.artifact.provider, edit=expose, exact=True)
    rows, _ = scenario.play(Stage(artifact, stage.vocabulary, stage.seed, window=stage.window))
    answers = answer(rows, streams=True)
    lowering = artifact.manifest["lowering"]["name"]
    names = sub_layers(masks)
    exposed = sum(name.startswith("stream.") for name in rows[0].outputs)
    if exposed != len(names) + 1:
        raise ArtifactError(f"{directory}: {exposed - 1} sub-layers write to the stream, the masks keep {len(names)}")
    stages = [_measure("embedding", "stream.0", "stream.0", rows, answers)]
    for number, (block, part) in enumerate(names, start=1):
        reference = f"stream.{2 * block + (1 if part == 'attention' else 2)}"
        found = _measure(f"block {block} {part}", f"stream.{number}", reference, rows, answers)
        stages.append(found | _widths(masks, block, part))
    stages.append(_measure("final norm and head", "logits", "logits", rows, answers))
    broken = next((entry for entry in stages if not entry["ratio"] <= limit), None)
    verdict = None if broken is None else _verdict(broken, limit, scenario.name, lowering)
    return {"verdict": verdict, "scenario": scenario.name, "limit": limit, "lowering": lowering, "stages": stages}


def sub_layers(masks: Masks) -> list[tuple[int, str]]:
    """Block and part of each sub-layer that is in the graph, in order."""
    return [
        (number, part)
        for number, block in enumerate(masks.blocks)
        for part, alive in (("attention", block.attention.alive), ("mlp", block.mlp.alive))
        if alive
    ]


def _measure(name: str, ours: str, theirs: str, rows: list[Row], answers: Answers) -> dict[str, Any]:
    renamed = [Row(row.text, row.at, {theirs: row.outputs[ours]}) for row in rows]
    found = [distance(row, answers, theirs) for row in renamed]
    ratio = np.concatenate([each.ratio for each in found])
    per_dimension = np.max(
        [np.abs(row.outputs[theirs] - answers.truth[row.text][theirs][row.at]).max(axis=0) for row in renamed], axis=0
    )
    worst = np.argsort(-per_dimension)[:SHOWN]
    return {
        "name": name,
        "error": max(float(each.error.max()) for each in found),
        "own_error": max(float(each.own.max()) for each in found),
        "ratio": float(ratio.max()),
        "worst_dimensions": sorted(int(d) for d in worst),
    }


def _widths(masks: Masks, block: int, part: str) -> dict[str, Any]:
    sets = masks.blocks[block].sets()
    return {"block": block, "part": part} | {
        name.removeprefix(f"{part}."): len(indices) for name, indices in sets.items() if name.startswith(f"{part}.")
    }


def _verdict(stage: dict[str, Any], limit: float, scenario: str, lowering: str) -> str:
    widths = ", ".join(f"{name} {stage[name]}" for name in ("read", "mid", "write") if name in stage)
    where = f"{stage['name']} ({widths}; lowering {lowering})" if widths else stage["name"]
    return (
        f"the first to be wrong is {where}: error {stage['error']:.2e}, {stage['ratio']:.3g} times its own "
        f"(limit {limit:g}), largest in dimensions {', '.join(map(str, stage['worst_dimensions']))}; in {scenario}"
    )
