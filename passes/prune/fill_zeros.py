"""Give sets that are not worth an index list their full width back, as zeros in the weights."""

import onnx_ir as ir

from dispc.masks import Masks
from dispc.model.config import DecoderConfig
from dispc.model.weights import rebind, weight_of
from dispc.passes.base import BlockPass
from dispc.passes.common.canonical import find_writes
from dispc.selection import SelectionCosts, sets_to_fill, sides
from dispc.support.graph import consumers, make_node, remove_dead, scope


class FillZerosPass(BlockPass):
    """Chosen read and write sets become zeros in the weights instead of index nodes.

    Before (S reads, w writes, d the width of the stream)::

        norm -> Gather(read) -> MatMul [S,mid] ... MatMul [mid,w] (-> Add bias [w]) -> ScatterND(r, write, ., add)

    After::

        norm -> MatMul [d,mid] ... MatMul [mid,d] (-> Add bias [d]) -> Add(r, .)

    1. Rows that were not read and columns that were not written are zero, so nothing changes but the work.
    2. Positions that align-widths repeated are not kept twice.
    3. A read before a norm (norm scope `selected`) cannot be chosen: the norm is over the read set.
    """

    name = "fill-zeros"

    def __init__(self, config: DecoderConfig, masks: Masks, costs: SelectionCosts) -> None:
        """`costs` decide which sets are filled, as `dispc.selection.sets_to_fill` says."""
        super().__init__(config, masks)
        self.costs = costs
        self.filled = sets_to_fill(masks, config, costs)

    def expected(self, model: ir.Model) -> int:
        return len(self.filled)

    def rewrite(self, model: ir.Model) -> int:
        graph = model.graph
        places = {self._place(number, name) for number, name in self.filled}
        reads = [node for node in graph if (node.name or "").removesuffix("/Gather") in places]
        for gather in reads:
            for reader in consumers(gather.outputs[0]):
                reader.replace_input_with(0, gather.inputs[0])
                rebind(reader.inputs[1], weight_of(reader.inputs[1]).fill(0))
            remove_dead(graph, [gather])
        writes = [write for write in find_writes(graph) if write.name in places]
        for write in writes:
            write.widen(lambda weight: weight.fill(-1), self.config.hidden_size)
            write.replace([make_node("Add", [write.stream, write.update], f"{write.name}/Add")])
        for side in sides(self.masks, self.config):
            if (side.block, side.name) not in self.filled:
                self.leave(f"{side.block}.{side.name}", self.costs.reason(side, self.masks.hidden_size))
        return len(reads) + len(writes)

    def _place(self, number: int, name: str) -> str:
        """The node names of block `number`'s set `name` begin with this."""
        part, side = name.split(".")
        return f"{scope(self.config.family.graph_module(number, part))}/{side}"
