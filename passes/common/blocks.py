"""Recognise the decoder blocks of a dense graph, and check that nothing in them is left unexplained.

Per block: every projection is found once, every reader of a norm is a projection of ours, every residual add is
accounted for, and nobody else reads the residual stream. Anything else is an error that names the node.
"""

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir

from dispc.model.families import Family
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
    """One sub-layer: its norm, the projections that read the stream, the one that writes to it."""

    module: str
    norm: ir.Node
    reads: tuple[Projection, ...]
    write: Projection


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

    @property
    def parallel(self) -> bool:
        """Both sub-layers read the same normalised stream (Phi)."""
        return self.attention.norm is self.mlp.norm


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
        attention = self._sub_layer(
            module, "self_attn", family.attention_norm, family.attention_reads, family.attention_out
        )
        mlp = self._sub_layer(module, "mlp", family.mlp_norm, family.mlp_reads, family.down)
        kernel = self._one(f"{module}.{family.query.rpartition('.')[0]}", "Attention")
        norms = {attention.norm: attention.reads, mlp.norm: mlp.reads}
        if attention.norm is mlp.norm:
            norms = {attention.norm: (*attention.reads, *mlp.reads)}
        for norm, reads in norms.items():
            expected = {read.matmul for read in reads}
            for reader in consumers(norm.outputs[0]):
                if reader not in expected:
                    raise CompileError(f"{reader.name} reads {norm.name}, but is no projection of {module}")
            for read in expected:
                if read.inputs[0] is not norm.outputs[0]:
                    raise CompileError(f"{read.name} must read {norm.name} directly")
        residual = attention.norm.inputs[0]
        assert residual is not None
        adds = tuple(node for node in self.by_module.get(scope(module), []) if node.op_type == "Add")
        output = _explain_adds(module, residual, attention, mlp, adds)
        return BlockParts(index, attention, mlp, kernel, residual, output, adds)

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

    def _sub_layer(self, block: str, name: str, norm: str, reads: tuple[str, ...], write: str) -> SubLayerParts:
        return SubLayerParts(
            f"{block}.{name}",
            self._one(f"{block}.{norm}", "RMSNormalization", "LayerNormalization"),
            tuple(self._projection(f"{block}.{read}") for read in reads),
            self._projection(f"{block}.{write}"),
        )


def _explain_adds(
    module: str, residual: ir.Value, attention: SubLayerParts, mlp: SubLayerParts, adds: tuple[ir.Node, ...]
) -> ir.Value:
    """Follow the residual adds of a block; the value that holds stream + attention + MLP is the block's output."""
    stream, writes = Counter(["stream"]), {attention.write.output: "attention", mlp.write.output: "mlp"}
    terms: dict[ir.Value, Counter[str]] = {residual: stream} | {v: Counter([name]) for v, name in writes.items()}
    for add in adds:
        parts = [terms.get(value) if value is not None else None for value in add.inputs]
        if None in parts:
            raise CompileError(
                f"{add.name}: adds something that is neither the residual stream nor a sub-layer's output"
            )
        terms[add.outputs[0]] = sum((part for part in parts if part is not None), Counter())
    everything = Counter(["stream", "attention", "mlp"])
    outputs = [value for value, found in terms.items() if found == everything]
    if len(outputs) != 1:
        raise CompileError(f"{module}: its residual adds do not add up to stream + attention + mlp")
    norms = {attention.norm, mlp.norm}
    for value, found in terms.items():
        if value is outputs[0]:
            continue
        for reader in consumers(value):
            if reader not in adds and not (reader in norms and "stream" in found):
                raise CompileError(f"{reader.name}: reads the residual stream of {module}, which dispc cannot explain")
    expected = stream if attention.norm is mlp.norm else Counter(["stream", "attention"])
    norm_input = mlp.norm.inputs[0]
    if norm_input is None or terms.get(norm_input) != expected:
        raise CompileError(f"{mlp.norm.name}: does not read the residual stream where its family does")
    return outputs[0]
