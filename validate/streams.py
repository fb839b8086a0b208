"""The residual stream of a graph: before the first sub-layer and after each one, whatever nodes are called."""

import onnx_ir as ir

from dispc.lowerings import WRITES
from dispc.support.errors import ArtifactError
from dispc.support.graph import consumers

BEFORE = ("Mul", "Add", "Cast")
"""Operators that may stand between the token embeddings and the stream."""
SKIP_NORMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")


def find_streams(model: ir.Model) -> list[ir.Value]:
    """The residual stream before the first sub-layer, and after each one, in order.

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
    """The residual stream before the first sub-layer: the embeddings.

    Raises:
        ArtifactError: when it cannot be found.
    """
    ids = next((value for value in model.graph.inputs if value.name == "input_ids"), None)
    lookups = [node for node in consumers(ids) if node.op_type.startswith("Gather")] if ids else []
    if len(lookups) != 1:
        raise ArtifactError(f"{len(lookups)} nodes look up input_ids, so the residual stream cannot be found")
    value = lookups[0].outputs[0]
    while (readers := consumers(value)) and readers[0].op_type in BEFORE and len(readers) == 1:
        value = readers[0].outputs[0]  # a scale, or the embeddings of positions
    return value


def _next(stream: ir.Value) -> ir.Value | None:
    """The stream after the next sub-layer has been added to `stream`; None at the end."""
    for node in consumers(stream):
        if node.op_type in WRITES:
            return node.outputs[0]
        if node.op_type in SKIP_NORMS:
            if len(node.outputs) < 4:
                node.resize_outputs(4)
            for number, value in enumerate(node.outputs):  # an empty name is how ONNX leaves an output out
                value.name = value.name or (f"{node.name}_output_3" if number == 3 else "")
            return node.outputs[3]
        if node.op_type == "Transpose":
            scatter = next((n for n in consumers(node.outputs[0]) if n.op_type in WRITES), None)
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
