"""The few ways in which dispc builds and reads ONNX graphs."""

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from google.protobuf.message import Message  # type: ignore[import-untyped]

from dispc.support.errors import ArtifactError, first_line
from dispc.support.inputs import naming, regular

MICROSOFT = "com.microsoft"
MACHINE_LEARNING = "ai.onnx.ml"
EXTRACTOR = "ArrayFeatureExtractor"
SIMPLIFIED_NORM = "SimplifiedLayerNormalization"
"""ONNX Runtime's RMS norm, which it keeps in the standard's own domain."""
GRAPH_BYTES = 64 * 2**20
"""The weights lie beside a graph: of 80 blocks it takes 4 MB."""
WINDOW = "dispc.window"
"""Metadata key of Attention nodes: the sliding window in tokens, 0 for none."""
PLACE = ("location", "offset", "length")
"""Keys of external data that say where in which file values are."""
TENSOR_FIELDS: dict[str, tuple[str, ...]] = {
    "ModelProto": ("graph", "functions", "training_info"),
    "GraphProto": ("initializer", "sparse_initializer", "node"),
    "FunctionProto": ("node", "attribute_proto"),
    "TrainingInfoProto": ("initialization", "algorithm"),
    "NodeProto": ("attribute",),
    "AttributeProto": ("t", "tensors", "sparse_tensor", "sparse_tensors", "g", "graphs"),
    "SparseTensorProto": ("values", "indices"),
}
"""Kinds of messages in a model, and the fields of each below which there may be tensors: a test holds it to ONNX."""
READ, WRITE, LAST = "/read/", "/write/", "/last/"
"""Parts of node names: what selects the read set of a sub-layer, what adds into its write set (both after the scope of
the sub-layer), and what takes the last token of each row (at the beginning)."""
READS, WRITES = "dispc.reads", "dispc.writes"
"""Metadata keys of projections: how much of each side is left, such as `288 of 576`."""


def read_graph(path: Path) -> onnx.GraphProto:
    """The graph in a file, without the weights beside it.

    Raises:
        ArtifactError, OSError: as `read_model` does.
    """
    return read_model(path).graph


def read_model(path: Path) -> onnx.ModelProto:
    """The model in a file, without the weights beside it.

    Raises:
        ArtifactError: when it is no ONNX model, or a text in it is not UTF-8.
        FileNotFoundError, PermissionError: when it cannot be opened.
    """
    regular(path, ArtifactError, GRAPH_BYTES)
    try:
        with naming(path):
            model = onnx.load(path, load_external_data=False)
        _require_text(model)
        _require_plain_places(model)
    except OSError:
        raise
    except Exception as error:  # what protobuf raises depends on its implementation
        raise ArtifactError(f"{path}: not an ONNX model ({first_line(error)})") from error
    if not model.graph.node:
        raise ArtifactError(f"{path}: not an ONNX model (it has no nodes)")
    return model


def _require_text(message: Message) -> None:
    """Raise ValueError for a text that is not UTF-8: protobuf decodes it when it is looked at, or leaves it bytes."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        for one in [value] if isinstance(value, str | bytes | Message) else value:
            if isinstance(one, Message):
                _require_text(one)
            elif not isinstance(one, str):
                raise ValueError(f"{field.name} of {message.DESCRIPTOR.name} is not UTF-8")


def _require_plain_places(model: onnx.ModelProto) -> None:
    """Raise ValueError for external data with more than its place: ONNX Runtime takes packed weights from such keys,
    instead of the values that everything else sees."""
    for tensor in _tensors(model):
        keys = [entry.key for entry in tensor.external_data]
        if strange := [key for key in keys if key not in PLACE or keys.count(key) > 1]:
            raise ValueError(f"the external data of {tensor.name} has {strange[0]}, which dispc never writes so")


def weight_files(model: onnx.ModelProto) -> set[str]:
    """The files that hold weights of a model, as it names them."""
    return {entry.value for entry in locations(model)}


def end_of_weights(model: onnx.ModelProto) -> int:
    """The bytes of a file with the weights of a model: where the last of them end."""
    places = ({entry.key: entry.value for entry in tensor.external_data} for tensor in _tensors(model))
    return max((int(place.get("offset", 0)) + int(place["length"]) for place in places if "length" in place), default=0)


def locations(message: Message) -> Iterator[onnx.StringStringEntryProto]:
    """What names a file of weights in a model or a part of it."""
    return (entry for tensor in _tensors(message) for entry in tensor.external_data if entry.key == "location")


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Initializers (sparse ones too), those of attributes, in graphs of attributes, functions and training."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for name in TENSOR_FIELDS[message.DESCRIPTOR.name]:
        found = getattr(message, name)
        if not isinstance(found, Message):
            for inner in found:
                yield from _tensors(inner)
        elif message.HasField(name):
            yield from _tensors(found)


def require_beside(path: Path, files: Iterable[str]) -> None:
    """Make sure that the weights of the model at `path` are regular files, or links to such, in its own directory.

    Raises:
        ArtifactError: for a path that leads elsewhere, a missing file, or what is no regular file.
    """
    for name in sorted(files):
        if Path(name).name != name or not name.strip("."):
            raise ArtifactError(f"{path}: its weights are in {name!r}, outside of its directory")
        if not (path.parent / name).exists():
            raise ArtifactError(f"{path.parent / name}: no such file; {path.name} has its weights there")
        regular(path.parent / name, ArtifactError)


@contextmanager
def without_links(path: Path) -> Iterator[Path]:
    """A path to the same graph for onnx.checker, which takes no links: weights are stood in for by holes of their size.

    Raises:
        ArtifactError: as `read_model` and `require_beside` do.
    """
    files = weight_files(read_model(path))
    require_beside(path, files)
    every = (path, *(path.parent / name for name in files))
    if not any(file.is_symlink() or file.stat().st_nlink > 1 for file in every):
        yield path
        return
    with TemporaryDirectory(prefix="dispc-check-") as folder:
        shutil.copyfile(path, Path(folder) / path.name)
        for name in files:
            with (Path(folder) / name).open("wb") as stand_in:
                stand_in.truncate((path.parent / name).stat().st_size)
        yield Path(folder) / path.name


def scope(module: str) -> str:
    """Node-name prefix of a module: `model.layers.3.mlp` becomes `/model/layers.3/mlp`."""
    return "/" + re.sub(r"\.(?!\d)", "/", module) if module else ""


def make_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    *,
    attributes: Mapping[str, Any] | None = None,
    domain: str = "",
    outputs: int | Sequence[ir.Value] = 1,
    dtype: ir.DataType | None = None,
) -> ir.Node:
    """A node whose outputs are named after it. `outputs` is their number, or existing values to take over."""
    if isinstance(outputs, int):
        suffixes = [""] if outputs == 1 else [f"_{i}" for i in range(outputs)]
        outputs = [ir.Value(name=f"{name}_output{suffix}") for suffix in suffixes]
    if dtype is not None:
        for value in outputs:
            value.dtype = dtype
    return ir.Node(
        domain,
        op_type,
        inputs,
        ir.convenience.convert_attributes(attributes or {}),
        outputs=outputs,
        name=name,
    )


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol | npt.NDArray[np.generic]) -> ir.Value:
    """The initializer called `name`, made from `tensor` unless the graph already has it."""
    if name in graph.initializers:
        return graph.initializers[name]
    if isinstance(tensor, np.ndarray):
        tensor = ir.tensor(tensor, name=name)
    tensor.name = name
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def drop_unused_initializers(graph: ir.Graph) -> None:
    """Remove initializers that nothing reads (graph outputs excepted)."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def remove_dead(graph: ir.Graph, roots: Iterable[ir.Node]) -> None:
    """Remove each of `roots`, and what fed only them, as long as nothing reads their outputs."""
    dead: dict[ir.Node, None] = {}
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node.graph is None or node in dead:
            continue
        if any(out.is_graph_output() or any(use.node not in dead for use in out.uses()) for out in node.outputs):
            continue
        dead[node] = None
        pending.extend(p for v in node.inputs if v is not None and (p := v.producer()) is not None)
    graph.remove(dead, safe=True)


def replace_node(graph: ir.Graph, node: ir.Node, made: ir.Node) -> None:
    """Put `made` in the place of `node`: what read the first output of one reads that of the other, named as before
    where the graph returns it."""
    made.metadata_props.update(node.metadata_props)
    graph.insert_before(node, made)
    old, new = node.outputs[0], made.outputs[0]
    new.type, new.shape = old.type, old.shape
    if old.is_graph_output():
        new.name = old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read `value`, each once."""
    return list(dict.fromkeys(use.node for use in value.uses()))
