"""The canonical reads and writes: how many the masks promise, and where they are in a graph."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from dispc.masks import Indices, Masks, SubLayer
from dispc.model.config import DecoderConfig
from dispc.model.weights import LazyWeight, rebind, weight_of
from dispc.passes.common.norms import recount
from dispc.support.errors import CompileError
from dispc.support.graph import READ, WRITE, consumers, remove_dead


def part_reads(masks: Masks) -> int:
    """How many sub-layers read a part of the stream: so many selections stand in the canonical form."""
    return sum(len(layer.read) < masks.hidden_size for layer in _alive(masks))


def part_writes(masks: Masks) -> int:
    """How many sub-layers add into a part of the stream: so many ScatterND stand in the canonical form."""
    return sum(len(layer.write) < masks.hidden_size for layer in _alive(masks))


def _alive(masks: Masks) -> Iterator[SubLayer]:
    return (layer for block in masks.blocks for layer in block.sub_layers.values() if layer.alive)


def find_selections(graph: ir.Graph) -> list[ir.Node]:
    """Every Gather of a read set, and every one by an inverse index that stands for a write set, in order."""
    names = (f"{READ}Gather", f"{WRITE}Gather")
    return [node for node in graph if node.op_type == "Gather" and (node.name or "").endswith(names)]


@dataclass(frozen=True)
class Write:
    """Transpose, ScatterND(add), Transpose: `update` [B,S,w] is added into positions `indices` [w] of `stream` [B,S,d].

    `parameters` are what makes the update, each with w as its last axis: a weight, perhaps a bias, and the weight of
    the `norm` after the sub-layer if it has one.
    """

    name: str
    first: ir.Node
    update: ir.Value
    indices: Indices
    parameters: tuple[ir.Value, ...]
    norm: ir.Node | None
    last: ir.Node

    @property
    def stream(self) -> ir.Value:
        """Read off the graph when asked for: an earlier write may have been replaced meanwhile."""
        stream = self.first.inputs[0]
        assert stream is not None
        return stream

    def widen(self, change: Callable[[LazyWeight], LazyWeight], width: int) -> None:
        """Let `change` give the update zeros at further positions, `width` in all."""
        for value in self.parameters:
            rebind(value, change(weight_of(value)))
        if self.norm:
            recount(self.norm, len(self.indices), width)

    def replace(self, nodes: Sequence[ir.Node]) -> None:
        """Put `nodes`, whose last output is the new stream, in the place of the write."""
        graph = self.last.graph
        assert isinstance(graph, ir.Graph)
        graph.insert_before(self.last, nodes)
        ir.convenience.replace_all_uses_with(self.last.outputs[0], nodes[-1].outputs[0])
        remove_dead(graph, [self.last])


def reads_of_projections(config: DecoderConfig, masks: Masks) -> list[Indices]:
    """The read sets of living sub-layers whose projections they stand directly before; others are a norm's."""
    modules = config.family.sub_layers
    return [
        layer.read
        for block in masks.blocks
        for name, layer in block.sub_layers.items()
        if layer.alive and (masks.norm_scope == "full" or modules[name].before is None)
    ]


def find_writes(graph: ir.Graph) -> list[Write]:
    """Every canonical write of the graph, in order.

    Raises:
        CompileError: naming the ScatterND that is none.
    """
    return [_write(node) for node in graph if node.op_type == "ScatterND"]


def _write(scatter: ir.Node) -> Write:
    first, second = (_before(scatter, scatter.inputs[position], "Transpose") for position in (0, 2))
    update, indices = second.inputs[0], scatter.inputs[1]
    if first.inputs[0] is None or update is None or indices is None or indices.const_value is None:
        raise CompileError(f"{scatter.name}: an input is missing, so this is no canonical write")
    after = update.producer()
    parameters, made = list[ir.Value](), update
    while (producer := _before(scatter, made, "MatMul", "Add", "RMSNormalization")).op_type != "MatMul":
        parameters += [value for value in producer.inputs if value is not None and value.is_initializer()]
        made = next(value for value in producer.inputs if value is not None and not value.is_initializer())
    parameters += [value for value in producer.inputs if value is not None and value.is_initializer()]
    return Write(
        name=(scatter.name or "").removesuffix("/ScatterND"),
        first=first,
        update=update,
        indices=indices.const_value.numpy()[:, 0],
        parameters=tuple(parameters),
        norm=after if after is not None and after.op_type == "RMSNormalization" else None,
        last=consumers(scatter.outputs[0])[0],
    )


def _before(scatter: ir.Node, value: ir.Value | None, *op_types: str) -> ir.Node:
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type not in op_types:
        name = value.name if value is not None else "an input"
        raise CompileError(f"{scatter.name}: {name} is not made as a canonical write makes it")
    return producer
