"""What is changed in a shipped graph before it is run or compared, in memory: the files stay as they are."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dispc.support.dtypes import DTYPES, ROWS
from dispc.support.errors import ArtifactError, first_line
from dispc.support.files import real
from dispc.support.graph import LAST, locations, read_model, require_beside, weight_files
from dispc.support.inputs import named_in_text

Edit = Callable[[ir.Model], None]
GATHERS = ("Gather", "GatherND")


def load_graph(path: Path) -> ir.Model:
    """The graph of an artifact, its weights still in their file.

    Files beside it that are links are followed, as ONNX Runtime does: the cache of the Hugging Face hub has them.

    Raises:
        ArtifactError: when it is no ONNX model, or names weights outside of its directory.
    """
    named_in_text(path, ArtifactError)  # the graph that is run names its weights by absolute paths
    proto = read_model(path)
    require_beside(path, weight_files(proto))
    for entry in locations(proto):
        entry.value = str(path.parent.absolute() / entry.value)  # onnx_ir refuses links where it knows a base directory
    try:
        return ir.from_proto(proto)
    except Exception as error:  # onnx_ir's share no base class
        raise ArtifactError(f"{path}: not an ONNX model ({first_line(error)})") from error


def serialise(model: ir.Model) -> tuple[bytes, set[Path]]:
    """A graph of `load_graph` as bytes, and the folders of its weights, which a session has to be given.

    ONNX Runtime follows no links out of that folder: named are the files that they lead to.
    """
    proto, folders = ir.to_proto(model), set()
    for entry in locations(proto):
        file = real(Path(entry.value))
        entry.value = file.name
        folders.add(file.parent)
    return proto.SerializeToString(), folders


def with_float32_outputs(edit: Edit | None) -> Edit:
    """numpy has no bfloat16, so that every output but the caches is cast (exactly) in the graph."""

    def widened(model: ir.Model) -> None:
        if edit:
            edit(model)
        outputs = model.graph.outputs
        for index, value in enumerate(outputs):
            if value.dtype == ir.DataType.BFLOAT16 and not (value.name or "").startswith("present."):
                name, value.name = value.name, f"{value.name}.bfloat16"
                cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}/Cast")
                cast.outputs[0].name, cast.outputs[0].dtype = name, ir.DataType.FLOAT
                cast.outputs[0].shape = value.shape
                model.graph.append(cast)
                outputs[index] = cast.outputs[0]

    return widened


def widen(model: ir.Model) -> ir.Model:
    """Make every half-precision tensor and type of `model` float32, in place."""
    halves, wide = [row.onnx for row in ROWS if row.bytes == 2], DTYPES["float32"].onnx
    graph = model.graph
    for value in _values(graph):
        if value.const_value is not None and value.const_value.dtype in halves:
            narrow = value.const_value
            value.const_value = ir.LazyTensor(
                partial(_as_float32, narrow), dtype=wide, shape=ir.Shape(narrow.shape.numpy()), name=narrow.name
            )
        if value.dtype in halves:
            value.dtype = wide
    for node in graph:
        target = node.attributes.get("to")
        if target is not None and target.as_int() in halves:
            node.attributes["to"] = ir.AttrInt64("to", wide)
    return model


def exactly_comparable(edit: Edit | None) -> Edit:
    """Undo what cannot be compared closely or everywhere: int8 activations, and logits of the last token only."""

    def comparable(model: ir.Model) -> None:
        _without_int8_activations(model)
        _with_all_logits(model)
        if edit:
            edit(model)

    return comparable


def _without_int8_activations(model: ir.Model) -> None:
    """Let every MatMulNBits of `model` multiply in floating point, in place.

    ONNX Runtime's CPU has such a kernel for 4-bit weights. Those of 8 bits it would dequantise anew in every call, 16
    times as slow as MatMul for one token, so that the graph says how to dequantise them once, when it is loaded.
    """
    for node in list(model.graph):
        if node.op_type != "MatMulNBits":
            continue
        rounding = node.attributes.pop("accuracy_level", None)
        if rounding and node.attributes["bits"].as_int() == 8:
            _dequantise(model.graph, node)


def _dequantise(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a MatMulNBits of 8 bits (ONNX Runtime's ContribOperators.md; K inputs, N outputs, blocks of a size).

    Before: MatMulNBits(x, integers [N,blocks,size], scales, zero points)
    After:  MatMul(x, Transpose(Slice(DequantizeLinear(integers [N,blocks*size], scales [N,blocks], zero points))))
    """
    inputs, outputs, size = (node.attributes[name].as_int() for name in ("K", "N", "block_size"))
    blocks = -(-inputs // size)
    tape = ir.tape.Tape()

    def constant(what: str, values: Sequence[int], dtype: type = np.int64) -> ir.Value:
        return tape.initializer(ir.tensor(np.array(values, dtype=dtype)), name=f"{node.name}/{what}")

    def zero_points() -> ir.Value:
        middle = constant("middle", [128], np.uint8)
        return tape.op("Expand", [middle, constant("all blocks", [outputs, blocks])])

    x, integers, scales, *rest = node.inputs
    by_block = constant("blocks", [outputs, blocks])
    weight = tape.op(
        "DequantizeLinear",
        [
            tape.op("Reshape", [integers, constant("integers", [outputs, blocks * size])]),
            tape.op("Reshape", [scales, by_block]),
            tape.op("Reshape", [rest[0], by_block]) if rest and rest[0] is not None else zero_points(),
        ],
        {"axis": 1, "block_size": size},
    )
    ends = [constant("start", [0]), constant("end", [inputs]), constant("axis", [1])]
    weight = tape.op("Transpose", [tape.op("Slice", [weight, *ends])], {"perm": [1, 0]})
    product = tape.op("MatMul", [x, weight], name=node.name)
    for value in tape.initializers:
        graph.register_initializer(value)
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [product])


def _with_all_logits(model: ir.Model) -> None:
    """Let the LM head of a `--last-logits` graph see every position, in place."""
    for node in model.graph:
        for position, value in enumerate(node.inputs):
            producer = value.producer() if value is not None else None
            if producer is not None and producer.op_type in GATHERS and (producer.name or "").startswith(LAST):
                node.replace_input_with(position, producer.inputs[0])
    for logits in (value for value in model.graph.outputs if value.name == "logits"):
        if logits.shape is not None:
            logits.shape = ir.Shape([logits.shape[0], "sequence_length", logits.shape[2]])


def _as_float32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
