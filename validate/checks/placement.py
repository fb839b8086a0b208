"""Where ONNX Runtime runs the nodes, by its own records."""

from collections.abc import Iterator

from dispc.runtime.placement import Placement, first_names
from dispc.support.errors import ArtifactError
from dispc.validate.checks.check import Check
from dispc.validate.comparison import Comparison

NAME = "placement"


def judge_placement(comparison: Comparison) -> Iterator[Check]:
    """No node away from the provider but shape arithmetic, and no copy between devices."""
    match comparison.placement:
        case Placement() as placement:
            yield check_placement(placement)
        case ArtifactError() as error:
            yield Check.failed(NAME, NAME, str(error))
        case None if comparison.artifact.provider == comparison.intended:
            yield Check.skipped(NAME, NAME, "the weights were widened: what ran is not what is stored")
        case None:
            reason = f"judged on {comparison.artifact.provider}; the target's is {comparison.intended}"
            yield Check.skipped(NAME, NAME, reason)


def check_placement(placement: Placement) -> Check:
    """Every node on the provider, and no copy between devices."""
    nodes = ", ".join(f"{count} nodes on {name}" for name, count in placement.nodes.items())
    troubles = [("not on the provider", placement.strays), ("copies", placement.copies)]
    detail = "; ".join([nodes, *(f"{what}: {first_names(names)}" for what, names in troubles if names)])
    elsewhere = float(len(placement.strays) + len(placement.copies))
    return Check.against(NAME, NAME, elsewhere, 0.0, "nodes elsewhere", detail)
