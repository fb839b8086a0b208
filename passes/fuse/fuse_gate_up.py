"""One projection for gate and up of a gated MLP."""

import onnx_ir as ir

from dispc.passes.base import BlockPass
from dispc.passes.common.packing import pack, projection_of
from dispc.support.graph import make_node, remove_dead, scope


class FuseGateUpPass(BlockPass):
    """The two projections that a gated MLP reads with become one.

    Before::

        h [S3] -> MatMul [S3,S4] (-> Add bias) -> gate
        h [S3] -> MatMul [S3,S4] (-> Add bias) -> up

    After::

        h [S3] -> MatMul [S3, 2 S4] (-> Add bias) -> Split -> gate, up
    """

    name = "fuse-gate-up"

    def _pairs(self, graph: ir.Graph) -> list[tuple[str, ir.Value, ir.Value]]:
        """MLP module, output of gate, output of up; for every block that still has them."""
        family = self.config.family
        if family.gate is None:
            return []
        nodes = {node.name: node for node in graph}
        pairs = []
        for index in range(self.config.num_hidden_layers):
            names = [scope(f"{family.block(index)}.{name}") for name in (family.gate, family.up)]
            ends = [nodes.get(f"{name}/Add") or nodes.get(f"{name}/MatMul") for name in names]
            outputs = [node.outputs[0] for node in ends if node is not None]
            if len(outputs) == 2:
                pairs.append((f"{family.block(index)}.{family.gate}".rpartition(".")[0], outputs[0], outputs[1]))
        return pairs

    def expected(self, model: ir.Model) -> int:
        """One for every MLP that is left, in a family that has gates."""
        return sum(block.mlp.alive for block in self.masks.blocks) if self.config.family.gate else 0

    def rewrite(self, model: ir.Model) -> int:
        graph, count = model.graph, 0
        for module, gate, up in self._pairs(graph):
            projections = [p for p in map(projection_of, (gate, up)) if p is not None]
            if len(projections) != 2:
                continue
            packed = pack(graph, projections, f"{module}.gate_up_proj")
            split = make_node(
                "Split",
                [packed],
                f"{scope(module)}/gate_up_proj/Split",
                attributes={"axis": -1, "num_outputs": 2},
                outputs=2,
            )
            after = packed.producer()
            assert after is not None
            graph.insert_after(after, split)
            for old, new in zip((gate, up), split.outputs, strict=True):
                producer = old.producer()
                ir.convenience.replace_all_uses_with(old, new)
                remove_dead(graph, [node for node in (producer,) if node is not None])
            count += 1
        return count
