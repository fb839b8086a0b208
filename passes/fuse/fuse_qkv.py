"""One projection for queries, keys and values."""

import onnx_ir as ir

from dispc.passes.base import BlockPass
from dispc.passes.common.packing import pack, projection_of
from dispc.support.errors import CompileError
from dispc.support.graph import remove_dead


class FuseQkvPass(BlockPass):
    """The three projections before GroupQueryAttention become one, whose output the operator takes packed.

    Before (S1 is the read set that all three share)::

        h [S1] -> MatMul [S1,dq]  (-> Add bias) (-> Mul scalar) -> GroupQueryAttention(query, key, value)
        h [S1] -> MatMul [S1,dkv] (-> Add bias) -----------------------------------------^
        h [S1] -> MatMul [S1,dkv] (-> Add bias) ----------------------------------------------^

    After::

        h [S1] -> MatMul [S1, dq + 2 dkv] (-> Add bias) -> GroupQueryAttention(packed)

    1. A scaling of the queries by a constant (OPT) moves into the operator's `scale`.
    2. Queries and keys that something stands before (the norms of Qwen3's heads, a RotaryEmbedding that could not
       be fused) stay three projections.
    """

    name = "fuse-qkv"

    def expected(self, model: ir.Model) -> int:
        """Every attention that is left, but those with norms of their heads, or with a rotation that was not fused."""
        numbers = [number for number, block in enumerate(self.masks.blocks) if block.attention.alive]
        kernels = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
        if len(kernels) != len(numbers):
            raise CompileError(f"pass {self.name}: {len(kernels)} attentions where {len(numbers)} are left")
        if self.config.family.head_norms:
            return 0
        return sum(
            "do_rotary" in kernel.attributes or not self.config.rotates(number)
            for number, kernel in zip(numbers, kernels, strict=True)
        )

    def rewrite(self, model: ir.Model) -> int:
        graph, count = model.graph, 0
        for kernel in [node for node in graph if node.op_type == "GroupQueryAttention"]:
            query, factor = _unscaled(kernel.inputs[0])
            sources = [projection_of(value) for value in (query, *kernel.inputs[1:3])]
            projections = [projection for projection in sources if projection is not None]
            if len(projections) < 3:
                after = next(v for v, p in zip((query, *kernel.inputs[1:3]), sources, strict=True) if p is None)
                producer = after.producer() if after is not None else None
                self.leave(kernel.name, f"{producer.op_type if producer else 'nothing'} stands after a projection")
                continue
            module = (projections[0].matmul.inputs[1].name or "").removesuffix(".weight").rpartition(".")[0]  # type: ignore[union-attr]
            old = [value.producer() for value in kernel.inputs[:3] if value is not None]
            packed = pack(graph, projections, f"{module}.qkv_proj")
            for position, value in enumerate((packed, None, None)):
                kernel.replace_input_with(position, value)
            scale = kernel.attributes["scale"].as_float() * factor
            kernel.attributes["scale"] = ir.AttrFloat32("scale", scale)
            remove_dead(graph, [node for node in old if node is not None])
            count += 1
        return count


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """`value` without a multiplication by a scalar constant, and that constant."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Mul":
        return value, 1.0
    for number, other in (node.inputs, reversed(node.inputs)):
        if number is not None and number.const_value is not None and number.const_value.size == 1:
            return other, float(number.const_value.numpy().item())
    return value, 1.0
