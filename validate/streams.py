"""The residual stream of a graph: in front of the first sub-layer and behind each one, whatever nodes are called."""

import onnx_ir as ir

from dispc.support.errors import ArtifactError
from dispc.support.graph import consumers

NORMS = ("RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization")
SKIP_NORMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")


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
    """In front of the Gather of a norm over the read set."""
    assert value is not None
    producer = value.producer()
    if producer is not None and producer.op_type == "Gather" and (producer.name or "").endswith("/read/Gather"):
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
