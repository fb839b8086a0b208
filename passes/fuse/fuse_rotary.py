"""Let GroupQueryAttention rotate queries and keys itself."""

import onnx_ir as ir

from dispc.passes.base import BlockPass
from dispc.support.errors import CompileError
from dispc.support.graph import remove_dead

HEAD_MULTIPLE, CACHE_MULTIPLE = 16, 8
"""What the kernels rotate: head sizes, and widths of the cos and sin caches (half the rotary dimensions)."""


class FuseRotaryPass(BlockPass):
    """RotaryEmbedding nodes before GroupQueryAttention become its attribute `do_rotary`.

    Before (cos and sin are [positions, rotary dimensions / 2], with rope scaling in them)::

        query -> RotaryEmbedding(., cos, sin, position_ids) -> GroupQueryAttention(., ., value, ...)
        key   -> RotaryEmbedding(., cos, sin, position_ids) ----------------------^

    After::

        query, key, value, ..., cos, sin -> GroupQueryAttention(do_rotary=1)

    1. The width of the caches says how many dimensions of a head rotate.
    2. For padding on the right only: there the operator, which counts positions from the length of each row, counts as
       position_ids do. A mask with zeros anywhere (`--padding left`) needs them, and the operator's own input of that
       name does not do: of a first prompt the CPU kernel (ONNX Runtime 1.31) takes one number for all rows and counts
       on from it, of later tokens each row's own, so that rows with padding are off from the first step on. What the
       CUDA kernel does was not tried. The input goes when nothing reads it.
    3. Where the head size is no multiple of 16, or the rotary dimensions none, the kernels cannot: the nodes stay.
    """

    name = "fuse-rotary"

    def expected(self, model: ir.Model) -> int:
        """One for every attention that is left, in a family that rotates, where the kernels can."""
        return 0 if self._impossible(model.graph) else self._rotations()

    def _impossible(self, graph: ir.Graph) -> str:
        """Why the kernels cannot rotate in this model; empty where they can, or nothing rotates."""
        if not self._rotations():
            return ""
        caches = [value.const_value for name, value in graph.initializers.items() if name.startswith("cos_cache")]
        widths = {int(cache.shape.numpy()[1]) for cache in caches if cache is not None}
        if not widths:
            raise CompileError(f"pass {self.name}: a {self.config.family.model_type} model has no cos_cache")
        possible = self.config.head_dim % HEAD_MULTIPLE == 0 and all(width % CACHE_MULTIPLE == 0 for width in widths)
        return (
            ""
            if possible
            else f"head size {self.config.head_dim}, of which {2 * max(widths)} rotate; the kernels "
            f"rotate multiples of {HEAD_MULTIPLE} and of {2 * CACHE_MULTIPLE}"
        )

    def _rotations(self) -> int:
        """Attentions that are left and rotate."""
        blocks = enumerate(self.masks.blocks)
        return sum(block.attention.alive and self.config.rotates(number) for number, block in blocks)

    def rewrite(self, model: ir.Model) -> int:
        graph, count = model.graph, 0
        if reason := self._impossible(graph):
            self.leave("every attention", reason)
            return 0
        for kernel in [node for node in graph if node.op_type == "GroupQueryAttention"]:
            rotated = [value.producer() if value is not None else None for value in kernel.inputs[:2]]
            if not all(node is not None and node.op_type == "RotaryEmbedding" for node in rotated):
                continue
            nodes = [node for node in rotated if node is not None]
            kernel.resize_inputs(max(len(kernel.inputs), 9))
            for position, node in enumerate(nodes):
                kernel.replace_input_with(position, node.inputs[0])
            kernel.replace_input_with(7, nodes[0].inputs[1])
            kernel.replace_input_with(8, nodes[0].inputs[2])
            kernel.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
            if "interleaved" in nodes[0].attributes:
                kernel.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)
            remove_dead(graph, nodes)
            count += 1
        for value in [v for v in graph.inputs if v.name == "position_ids" and not v.uses()]:
            graph.inputs.remove(value)
        return count
