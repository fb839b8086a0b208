"""Where an artifact goes wrong: the residual stream after every sub-layer, against the reference's.

Sub-layers depend on each other through the stream alone, so the first place at which it is off by more than its budget
is the first sub-layer that computes something else.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dispc.masks import Masks
from dispc.reference.truth import Answers, freed
from dispc.runtime.session import Artifact
from dispc.support.errors import ArtifactError
from dispc.validate.checks.parity import measure
from dispc.validate.checks.scenarios import Scenario
from dispc.validate.client import Client, Row
from dispc.validate.comparison import Comparison
from dispc.validate.report.report import Drill, StreamError
from dispc.validate.streams import expose

SHOWN = 6
"""Dimensions of the stream that a report names."""


def drill_down(comparison: Comparison, scenario: Scenario, limit: float) -> Drill:
    """Run `scenario` again with all streams exposed, and find the first sub-layer over its budget.

    There is a stage for the embedding, each living sub-layer and the logits. Where the graph has fewer streams than the
    masks have sub-layers, or more, those that are there are compared.
    """
    try:
        return _drill_down(comparison, scenario, limit)
    except ArtifactError as error:  # what the checks found must not be lost
        return Drill(verdict=f"no drill: {error}", scenario=scenario.name, limit=limit)


def _drill_down(comparison: Comparison, scenario: Scenario, limit: float) -> Drill:
    artifact, client = comparison.artifact, comparison.client
    exposed = Artifact(
        comparison.directory, provider=artifact.provider, edit=expose, exact=True, widened=artifact.widened
    )
    rows, _ = scenario.run(Client(exposed, client.vocabulary, client.seed, window=client.window))
    answers = comparison.answers(rows, streams=True)
    with freed(answers.blocks.model):
        stages, remark = _stages(rows, answers, comparison.masks)
    lowering = artifact.manifest.lowering.name
    broken = next((stage for stage in stages if not stage.ratio <= limit), None)
    verdict = None if broken is None else _verdict(broken, limit, scenario.name, lowering)
    if remark:  # where the logits are right, the streams were compared with the wrong ones
        wrong = verdict is not None and not stages[-1].ratio <= limit
        verdict = f"{verdict} ({remark})" if wrong else f"no drill: {remark}"
    return Drill(verdict=verdict, scenario=scenario.name, limit=limit, lowering=lowering, stages=tuple(stages))


def _stages(rows: list[Row], answers: Answers, masks: Masks) -> tuple[list[StreamError], str]:
    """Every stream that the graph has against the reference's, and a remark where their numbers differ."""
    names = sub_layers(masks)
    written = sum(name.startswith("stream.") for name in rows[0].outputs) - 1
    stages = [_measure("embedding", "stream.0", "stream.0", rows, answers)]
    for number, (block, part) in enumerate(names[:written], start=1):
        reference = f"stream.{2 * block + (1 if part == 'attention' else 2)}"
        stage = _measure(f"block {block} {part}", f"stream.{number}", reference, rows, answers)
        widths = {name: len(indices) for name, indices in masks.blocks[block].sets().items()}
        stages.append(
            replace(
                stage,
                block=block,
                part=part,
                read=widths[f"{part}.read"],
                mid=widths.get(f"{part}.mid"),
                write=widths[f"{part}.write"],
            )
        )
    stages.append(_measure("final norm and head", "logits", "logits", rows, answers))
    remark = f"{written} sub-layers write to the stream, the masks keep {len(names)}" if written != len(names) else ""
    return stages, remark


def sub_layers(masks: Masks) -> list[tuple[int, str]]:
    """Block and part of each sub-layer that is in the graph, in order."""
    return [
        (number, part)
        for number, block in enumerate(masks.blocks)
        for part, layer in block.sub_layers.items()
        if layer.alive
    ]


def _measure(name: str, ours: str, theirs: str, rows: Sequence[Row], answers: Answers) -> StreamError:
    distances = measure([Row(row.text, row.at, {theirs: row.outputs[ours]}) for row in rows], answers, theirs)
    worst = np.argsort(-np.max([each.dimensions for each in distances], axis=0))[:SHOWN]
    return StreamError(
        name=name,
        error=max(float(each.error.max()) for each in distances),
        own_error=max(float(each.own.max()) for each in distances),
        ratio=max(float(each.ratio.max()) for each in distances),
        worst_dimensions=tuple(sorted(int(d) for d in worst)),
    )


def _verdict(stage: StreamError, limit: float, scenario: str, lowering: str) -> str:
    where = f"{stage.name} ({stage.widths}; lowering {lowering})" if stage.widths else stage.name
    return (
        f"the first to be wrong is {where}: error {stage.error:.2e}, {stage.ratio:.3g} times its own "
        f"(limit {limit:g}), largest in dimensions {', '.join(map(str, stage.worst_dimensions))}; in {scenario}"
    )
