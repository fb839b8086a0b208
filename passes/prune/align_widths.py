"""Widths that matrix units like: multiples of 8 or more, with zero rows and columns."""

import numpy as np
import onnx_ir as ir

from dispc.masks import Masks
from dispc.model.config import DecoderConfig
from dispc.model.weights import rebind, weight_of
from dispc.passes.base import BlockPass
from dispc.passes.common.canonical import reads_of_projections
from dispc.support.graph import READ, add_initializer, consumers


class AlignWidthsPass(BlockPass):
    """Read and mid widths are padded to a multiple of `multiple`.

    Before (S and M are any numbers)::

        norm -> Gather(read [S]) -> MatMul [S,M] -> act -> MatMul [M,w]

    After (S' and M' are the next multiples; rows S.. and columns M.. of the first weight, rows M.. of the second and
    the bias between them are zero)::

        norm -> Gather(read [S']) -> MatMul [S',M'] -> act -> MatMul [M',w]

    1. The positions added to a read set repeat its last one: their weights are zero.
    2. act(0) meets zero rows, whatever the activation is.
    3. Write widths are padded where the write is lowered. A read before a norm (norm scope `selected`) stays as it
       is: the norm counts its positions.
    """

    name = "align-widths"
    option_names = ("multiple",)

    def __init__(self, config: DecoderConfig, masks: Masks, multiple: int) -> None:
        super().__init__(config, masks)
        self.multiple = multiple

    def _more(self, size: int) -> int:
        return -(-size // self.multiple) * self.multiple

    def _reads(self, graph: ir.Graph) -> list[ir.Node]:
        return [
            node
            for node in graph
            if (node.name or "").endswith(f"{READ}Gather")
            and _size(node.inputs[1], 0) % self.multiple
            and all(reader.op_type == "MatMul" for reader in consumers(node.outputs[0]))
        ]

    def _mids(self, graph: ir.Graph) -> list[str]:
        """The MLP blocks (by module of the block) whose mid width is no multiple."""
        family = self.config.family
        modules = [family.block(index) for index in range(self.config.num_hidden_layers)]
        downs = [(module, graph.initializers.get(f"{module}.{family.down}.weight")) for module in modules]
        return [module for module, down in downs if down is not None and _size(down, 0) % self.multiple]

    def expected(self, model: ir.Model) -> int:
        """Every read set before projections and every mid set whose width is no multiple."""
        masks = self.masks
        gathered = [read for read in reads_of_projections(self.config, masks) if len(read) < masks.hidden_size]
        mids = [block.mlp.mid for block in masks.blocks if block.mlp.alive and block.mlp.mid is not None]
        return sum(len(indices) % self.multiple != 0 for indices in (*gathered, *mids))

    def rewrite(self, model: ir.Model) -> int:
        graph, count = model.graph, 0
        for gather in self._reads(graph):
            indices = gather.inputs[1]
            assert indices is not None and indices.const_value is not None
            read = indices.const_value.numpy()
            more = self._more(len(read))
            aligned = np.concatenate([read, np.full(more - len(read), read[-1])])
            gather.replace_input_with(1, add_initializer(graph, f"{indices.name}.aligned", aligned))
            for reader in consumers(gather.outputs[0]):
                rebind(reader.inputs[1], weight_of(reader.inputs[1]).pad(0, more))
            count += 1
        for module in self._mids(graph):
            family = self.config.family
            down = graph.initializers[f"{module}.{family.down}.weight"]
            more = self._more(_size(down, 0))
            rebind(down, weight_of(down).pad(0, more))
            for read_name in family.mlp_reads:
                for suffix in ("weight", "bias"):
                    value = graph.initializers.get(f"{module}.{read_name}.{suffix}")
                    if value is not None:
                        rebind(value, weight_of(value).pad(-1, more))
            count += 1
        return count


def _size(value: ir.Value | None, axis: int) -> int:
    assert value is not None and value.const_value is not None
    return int(value.const_value.shape.numpy()[axis])
