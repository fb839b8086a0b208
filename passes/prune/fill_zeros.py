"""Give sets that keep nearly everything their full width back, as zeros in the weights."""

import numpy as np
import onnx_ir as ir

from dispc.masks import Masks
from dispc.model.families import DecoderConfig
from dispc.model.weights import rebind, weight_of
from dispc.passes.base import RewritePass
from dispc.passes.common.canonical import Write, find_writes, reads_of_projections
from dispc.support.graph import consumers, drop_unused_initializers, make_node, remove_dead


class FillZerosPass(RewritePass):
    """A read or write set of at least `share` of the stream becomes zeros in the weights instead of index nodes.

    Before (S reads, w writes, d the width of the stream)::

        norm -> Gather(read) -> MatMul [S,mid] ... MatMul [mid,w] (-> Add bias [w]) -> ScatterND(r, write, ., add)

    After, where S and w are large enough::

        norm -> MatMul [d,mid] ... MatMul [mid,d] (-> Add bias [d]) -> Add(r, .)

    1. Rows that were not read and columns that were not written are zero, so nothing changes but the work.
    2. Positions that align-widths repeated are not kept twice.
    3. A read in front of a norm (norm scope `selected`) stays: the norm is over the read set.
    """

    name = "fill-zeros"

    def __init__(self, config: DecoderConfig, masks: Masks, share: float) -> None:
        super().__init__()
        self.config = config
        self.masks = masks
        self.least = share * masks.hidden_size

    def _reads(self, graph: ir.Graph) -> list[ir.Node]:
        gathers = [node for node in graph if (node.name or "").endswith("/read/Gather")]
        return [
            node
            for node in gathers
            if _kept(node.inputs[1]) >= self.least
            and all(reader.op_type == "MatMul" for reader in consumers(node.outputs[0]))
        ]

    def _writes(self, graph: ir.Graph) -> list[Write]:
        return [write for write in find_writes(graph) if len(write.indices) >= self.least]

    def expected(self, model: ir.Model) -> int:
        """Every write set, and every read set in front of projections, that is large enough and not full."""
        layers = [layer for block in self.masks.blocks for layer in (block.attention, block.mlp) if layer.alive]
        sides = [layer.write for layer in layers]
        sides += reads_of_projections(self.config, self.masks)
        return sum(self.least <= len(side) < self.masks.hidden_size for side in sides)

    def rewrite(self, model: ir.Model) -> int:
        graph, count = model.graph, 0
        for gather in self._reads(graph):
            for reader in consumers(gather.outputs[0]):
                reader.replace_input_with(0, gather.inputs[0])
                rebind(reader.inputs[1], weight_of(reader.inputs[1]).fill(0))
            remove_dead(graph, [gather])
            count += 1
        for write in self._writes(graph):
            write.widen(lambda weight: weight.fill(-1), self.masks.hidden_size)
            write.replace([make_node("Add", [write.stream, write.update], f"{write.name}/Add")])
            count += 1
        drop_unused_initializers(graph)
        return count


def _kept(indices: ir.Value | None) -> int:
    return 0 if indices is None or indices.const_value is None else len(np.unique(indices.const_value.numpy()))
