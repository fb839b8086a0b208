"""Where ONNX Runtime runs each node, by its own records.

It records providers when it partitions the graph: after its basic optimisations and before it inserts copies. What the
session finally runs is in the optimised graph, which names no providers. So both are read.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from dispc.runtime.edits import load_graph
from dispc.runtime.providers import Provider
from dispc.runtime.session import open_session
from dispc.support.errors import ArtifactError

NAMED = 8
"""Nodes named in a sentence; all of them are in the report."""


@dataclass(frozen=True)
class Placement:
    """Node name -> (operator, provider) as partitioned; node name -> operator as run, where copies are Memcpy*.

    `expected` are the nodes that may be on the CPU beside CUDA: arithmetic on shapes alone.
    """

    provider: Provider
    assigned: dict[str, tuple[str, str]]
    optimised: dict[str, str]
    expected: frozenset[str]

    @property
    def nodes(self) -> dict[str, int]:
        """Provider -> number of nodes."""
        return dict(Counter(provider for _, provider in self.assigned.values()))

    @property
    def strays(self) -> list[str]:
        """Nodes that are not where the target wants them, shape arithmetic excepted."""
        return [
            name
            for name, (_, where) in self.assigned.items()
            if where != self.provider.name and name not in self.expected
        ]

    @property
    def copies(self) -> list[str]:
        """Copies between devices in the graph that is run."""
        return [name for name, op_type in self.optimised.items() if op_type.startswith("Memcpy")]

    def as_dict(self) -> dict[str, object]:
        content: dict[str, object] = {
            "provider": self.provider.name,
            "assigned": self.assigned,
            "optimised": self.optimised,
        }
        return content | {"nodes": self.nodes, "unexpected": self.strays, "copies": self.copies}


def place(model: Path, provider: Provider) -> Placement:
    """Load `model` on `provider` and read where its nodes went.

    Raises:
        ArtifactError: when it does not load there, or nodes share a name.
    """
    with tempfile.TemporaryDirectory(prefix="dispc-placement-") as scratch:
        optimised = Path(scratch) / "optimised.onnx"
        config = {"session.record_ep_graph_assignment_info": "1"}
        config["session.optimized_model_external_initializers_file_name"] = "optimised.data"
        session = open_session(model, provider=provider, config=config, optimised_model=optimised)
        graph = onnx.load(optimised, load_external_data=False).graph
    nodes = [(node, part.ep_name) for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
    assigned = zip(
        own_names(model, [node for node, _ in nodes]), [(node.op_type, name) for node, name in nodes], strict=True
    )
    run = zip(own_names(model, graph.node), [node.op_type for node in graph.node], strict=True)
    return Placement(provider, dict(assigned), dict(run), frozenset(shape_arithmetic(load_graph(model))))


def own_names(model: Path, nodes: Iterable[Any]) -> list[str]:
    """A name for each node; those that ONNX Runtime inserts without one (casts) get their operator and a number.

    Raises:
        ArtifactError: when nodes share a name.
    """
    names = [node.name or f"{node.op_type} {number} without a name" for number, node in enumerate(nodes)]
    if shared := [name for name, uses in Counter(names).items() if uses > 1]:
        raise ArtifactError(f"{model}: nodes that share a name: {first_names(shared)}")
    return names


def shape_arithmetic(model: ir.Model) -> set[str]:
    """Nodes outside of the blocks that compute with nothing but shapes: ONNX Runtime keeps those on the CPU."""
    derived: set[ir.Value] = set()
    names = set()
    for node in model.graph:
        sources = [value for value in node.inputs if value is not None and value.const_value is None]
        if node.op_type in ("Shape", "Size") or (sources and all(value in derived for value in sources)):
            derived.update(node.outputs)
            if "layers." not in (node.name or ""):
                names.add(node.name or "")
    return names


def first_names(names: list[str]) -> str:
    """The first `NAMED` of `names`, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
