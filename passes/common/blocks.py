"""Recognise the decoder blocks of a dense graph, and check that nothing in them is left unexplained.

Per block: every projection is found once, every reader of a norm is a projection of ours, every residual add is
accounted for, and nobody else reads the residual stream. Anything else is an error that names the node.
"""

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir

from dispc.model.family import Family, SubLayerNames
from dispc.support.errors import CompileError
from dispc.support.graph import consumers, scope


@dataclass(frozen=True)
class Projection:
    """A linear layer: its MatMul, and the Add of its bias if it has one."""

    matmul: ir.Node
    bias: ir.Node | None

    @property
    def output(self) -> ir.Value:
        return (self.bias or self.matmul).outputs[0]


@dataclass(frozen=True)
class SubLayerParts:
    """One sub-layer: the norm before it, the projections that read, the one that writes, the norm after it."""

    module: str
    norm: ir.Node | None
    reads: tuple[Projection, ...]
    write: Projection
    after: ir.Node | None

    @property
    def entrance(self) -> ir.Value:
        """The residual stream, as the sub-layer reads it."""
        value = (self.norm or self.reads[0].matmul).inputs[0]
        assert value is not None
        return value

    @property
    def readers(self) -> tuple[ir.Node, ...]:
        """The nodes that read the residual stream."""
        return (self.norm,) if self.norm else tuple(read.matmul for read in self.reads)

    @property
    def update(self) -> ir.Value:
        """What is added to the residual stream."""
        return self.after.outputs[0] if self.after else self.write.output


@dataclass(frozen=True)
class BlockParts:
    """A recognised block. `adds` are all its residual adds; the stream enters at `residual` and leaves at `output`."""

    index: int
    attention: SubLayerParts
    mlp: SubLayerParts
    kernel: ir.Node
    residual: ir.Value
    output: ir.Value
    adds: tuple[ir.Node, ...]
    parallel: bool
    """Both sub-layers read the stream that enters the block (Phi, Pythia)."""

    @property
    def sub_layers(self) -> dict[str, SubLayerParts]:
        """`attention` and `mlp`, in this order."""
        return {"attention": self.attention, "mlp": self.mlp}


class BlockFinder:
    """Finds the blocks of one graph by node name, which is the module that a node was traced in."""

    def __init__(self, graph: ir.Graph, family: Family) -> None:
        self.family = family
        self.by_module: dict[str, list[ir.Node]] = {}
        for node in graph:
            self.by_module.setdefault((node.name or "").rpartition("/")[0], []).append(node)

    def find(self, index: int) -> BlockParts:
        """Block `index`, checked.

        Raises:
            CompileError: naming the node or module that is missing, repeated or unexplained.
        """
        family, module = self.family, self.family.block(index)
        attention, mlp = (self._sub_layer(index, name, names) for name, names in family.sub_layers.items())
        kernel = self._one(f"{module}.{family.attention_module}", "Attention")
        readers: dict[ir.Value, list[ir.Node]] = {}
        for part in (attention, mlp):
            source = part.norm.outputs[0] if part.norm else part.entrance
            readers.setdefault(source, []).extend(read.matmul for read in part.reads)
            for read in part.reads:
                if read.matmul.inputs[0] is not source:
                    raise CompileError(f"{read.matmul.name} must read {source.name} directly")
            if part.after and (part.after.inputs[0] is not part.write.output or len(part.write.output.uses()) != 1):
                raise CompileError(f"{part.after.name} must read {part.write.output.name}, and nothing else may")
        for norm in dict.fromkeys(part.norm for part in (attention, mlp) if part.norm):
            for reader in consumers(norm.outputs[0]):
                if reader not in readers[norm.outputs[0]]:
                    raise CompileError(f"{reader.name} reads {norm.name}, but is no projection of {module}")
        adds = tuple(node for node in self.by_module.get(scope(module), []) if node.op_type == "Add")
        output, parallel = _explain_adds(module, attention, mlp, adds)
        return BlockParts(index, attention, mlp, kernel, attention.entrance, output, adds, parallel)

    def _one(self, module: str, *op_types: str) -> ir.Node:
        nodes = [node for node in self.by_module.get(scope(module), []) if node.op_type in op_types]
        if len(nodes) != 1:
            raise CompileError(f"{module}: expected one {' or '.join(op_types)}, found {len(nodes)}")
        return nodes[0]

    def _projection(self, module: str) -> Projection:
        matmul = self._one(module, "MatMul")
        weight = matmul.inputs[1]
        if weight is None or weight.name != f"{module}.weight" or not weight.is_initializer():
            raise CompileError(f"{matmul.name}: its weight is not {module}.weight")
        biases = [node for node in self.by_module[scope(module)] if node is not matmul]
        if any(node.op_type != "Add" or f"{module}.bias" not in [v and v.name for v in node.inputs] for node in biases):
            raise CompileError(f"{biases[0].name} is neither the MatMul nor the bias of {module}")
        return Projection(matmul, biases[0] if biases else None)

    def _norm(self, block: str, name: str | None) -> ir.Node | None:
        return self._one(f"{block}.{name}", "RMSNormalization", "LayerNormalization") if name else None

    def _sub_layer(self, index: int, side: str, names: SubLayerNames) -> SubLayerParts:
        block = self.family.block(index)
        return SubLayerParts(
            self.family.graph_module(index, side),
            self._norm(block, names.before),
            tuple(self._projection(f"{block}.{read}") for read in names.reads),
            self._projection(f"{block}.{names.write}"),
            self._norm(block, names.after),
        )


def _explain_adds(
    module: str, attention: SubLayerParts, mlp: SubLayerParts, adds: tuple[ir.Node, ...]
) -> tuple[ir.Value, bool]:
    """Follow the residual adds of a block.

    Returns the value that holds stream + attention + MLP, which is the block's output, and whether the MLP reads what
    enters the block.
    """
    stream, updates = Counter(["stream"]), {attention.update: "attention", mlp.update: "mlp"}
    terms = {attention.entrance: stream} | {value: Counter([name]) for value, name in updates.items()}
    for add in adds:
        parts = [terms.get(value) if value is not None else None for value in add.inputs]
        if None in parts:
            raise CompileError(
                f"{add.name}: adds something that is neither the residual stream nor a sub-layer's output"
            )
        terms[add.outputs[0]] = sum((part for part in parts if part is not None), Counter())
    everything = Counter(["stream", "attention", "mlp"])
    outputs = [value for value, summed in terms.items() if summed == everything]
    if len(outputs) != 1:
        raise CompileError(f"{module}: its residual adds do not add up to stream + attention + mlp")
    readers = {*attention.readers, *mlp.readers}
    for value, summed in terms.items():
        if value is outputs[0]:
            continue
        for reader in consumers(value):
            if reader not in adds and not (reader in readers and "stream" in summed):
                raise CompileError(f"{reader.name}: reads the residual stream of {module}, which dispc cannot explain")
    entering = terms.get(mlp.entrance)
    if entering not in (stream, Counter(["stream", "attention"])):
        raise CompileError(f"{mlp.readers[0].name}: does not read the residual stream where its family does")
    return outputs[0], entering == stream
