"""Store weights as integers of 4 or 8 bits that share a scale block by block."""

import threading
from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from dispc.model.config import DecoderConfig
from dispc.model.family import HEAD
from dispc.passes.base import RewritePass
from dispc.passes.rounding import inverse_factor, round_weight
from dispc.quantisation import Quantisation, product_of
from dispc.support.arrays import Array
from dispc.support.errors import CompileError
from dispc.support.graph import MICROSOFT, add_initializer, make_node, replace_node

INT8_ACTIVATIONS = 4
"""The `accuracy_level` that lets kernels round activations to int8."""
PIECE = 2**22
"""Weights quantised at a time: what does not come as float32 or float16 is widened in pieces."""


class QuantisePass(RewritePass):
    """MatMul with a constant weight becomes com.microsoft.MatMulNBits, if asked the embedding GatherBlockQuantized.

    Before::

        x -> MatMul(., weight [K,N]) (-> Add bias)
        input_ids -> Gather(embedding [V,d], .)

    After (b the block size, k = ceil(K / b))::

        x -> MatMulNBits(., weight uint8 [N, k, b * bits / 8], scales [N,k]) (-> Add bias)
        input_ids -> GatherBlockQuantized(embedding uint8 [V, d * bits / 8], ., scales [V, ceil(d / b)])

    and where the LM head is the embedding (`tied`), both are quantised and d is a multiple of b::

        x -> MatMulNBits(., Reshape(embedding uint8, [V, d / b, b * bits / 8]), scales [V, d / b])

    1. A block is b weights of one output, along its inputs: after pruning, those that are left. K need not be a
       multiple of b.
    2. Asymmetric quantisation adds zero points, packed like the weights: uint8 [N, ceil(k * bits / 8)].
    3. The products that mixed quantisation names have 8 bits, symmetric.
    4. Biases stay an Add: the fast CUDA kernels take none.
    5. Nothing is computed here: integers, scales and zero points are lazy, and are made together (`QuantisedWeight`).
    6. MatMulNBits refuses the embedding's two dimensions; ONNX Runtime folds the Reshape when a session is made.
    """

    name = "quantise"

    def __init__(
        self,
        quantisation: Quantisation,
        config: DecoderConfig,
        *,
        tied: bool = False,
        hessians: Mapping[str, Array] | None = None,
    ) -> None:
        """`tied` says that the LM head is to share the embedding's integers; `hessians` are those of the products."""
        super().__init__()
        self.quantisation = quantisation
        self.config = config
        self.embedding = f"{config.family.embedding}.weight"
        self.hessians = hessians or {}
        self.tied = tied and quantisation.head and quantisation.embedding

    @property
    def options(self) -> dict[str, str | int | bool]:
        return self.quantisation.as_dict() | {"tied": self.tied}

    def expected(self, model: ir.Model) -> int:
        """Every MatMul that is left in a decoder is a projection; the LM head and the embedding count when asked."""
        matmuls = sum(node.op_type == "MatMul" for node in model.graph)
        lookups = sum(node.op_type == "Gather" and _name(node.inputs[1]) == "input_ids" for node in model.graph)
        spared = HEAD in model.graph.initializers and not self.quantisation.head  # a tied head is no MatMul any more
        return matmuls - spared + lookups * self.quantisation.embedding

    def rewrite(self, model: ir.Model) -> int:
        graph, count = model.graph, 0
        for node in list(graph):
            weight = _weight(node)
            if weight is None:
                continue
            if node.op_type == "MatMul" and (weight.name != HEAD or self.quantisation.head):
                replace_node(graph, node, self._matmul(graph, node, weight))
                count += 1
            elif node.op_type == "Gather" and weight.name == self.embedding and self.quantisation.embedding:
                replace_node(graph, node, self._gather(graph, node, weight))
                count += 1
        if count:
            graph.opset_imports[MICROSOFT] = 1
        return count

    def _matmul(self, graph: ir.Graph, node: ir.Node, weight: ir.Value) -> ir.Node:
        assert weight.const_value is not None
        inputs, outputs = weight.const_value.shape.numpy()
        quantisation = self.quantisation.of(product_of(weight.name or "", self.config.family))
        accuracy = {"accuracy_level": INT8_ACTIVATIONS} if quantisation.int8_activations else {}
        return make_node(
            "MatMulNBits",
            [node.inputs[0], *self._blocks(graph, node, weight)],
            (node.name or "").removesuffix("MatMul") + "MatMulNBits",
            domain=MICROSOFT,
            attributes=_attributes(quantisation) | {"K": inputs, "N": outputs} | accuracy,
        )

    def _blocks(self, graph: ir.Graph, node: ir.Node, weight: ir.Value) -> list[ir.Value]:
        """Integers, scales and zero points of what `node` multiplies by: its own, or those of the embedding."""
        assert weight.const_value is not None
        inputs, outputs = weight.const_value.shape.numpy()
        bits, size = self.quantisation.bits, self.quantisation.block_size
        if weight.name != HEAD or not self.tied or inputs % size:
            product = product_of(weight.name or "", self.config.family)
            if self.hessians and product not in self.hessians:
                raise CompileError(
                    f"{node.name}: no inputs of the product {product} were recorded, which GPTQ looks at"
                )
            quantised = QuantisedWeight(
                weight.const_value, self.quantisation.of(product), hessian=self.hessians.get(product)
            )
            return self._initializers(graph, weight, quantised)
        data, *rest = self._rows(graph, graph.initializers[self.embedding])
        shape = np.array([outputs, inputs // size, size * bits // 8], dtype=np.int64)
        turn = make_node("Reshape", [data, add_initializer(graph, "lm_head.blocks", shape)], "/lm_head/Reshape")
        graph.insert_before(node, turn)
        return [turn.outputs[0], *rest]

    def _gather(self, graph: ir.Graph, node: ir.Node, weight: ir.Value) -> ir.Node:
        data, *rest = self._rows(graph, weight)
        return make_node(
            "GatherBlockQuantized",
            [data, node.inputs[1], *rest],
            (node.name or "").removesuffix("Gather") + "GatherBlockQuantized",
            domain=MICROSOFT,
            attributes=_attributes(self.quantisation) | {"gather_axis": 0, "quantize_axis": 1},
        )

    def _rows(self, graph: ir.Graph, weight: ir.Value) -> list[ir.Value]:
        """Integers, scales and zero points of the embedding, made once."""
        assert weight.const_value is not None
        width = weight.const_value.shape.numpy()[1]
        if width * self.quantisation.bits % 8:
            raise CompileError(f"{weight.name}: int4 embeddings need an even width, this one's is {width}")
        hessian = self.hessians.get("head") if self.tied else None
        quantised = QuantisedWeight(weight.const_value, self.quantisation, rows=True, hessian=hessian)
        return self._initializers(graph, weight, quantised)

    def _initializers(self, graph: ir.Graph, weight: ir.Value, quantised: "QuantisedWeight") -> list[ir.Value]:
        return [add_initializer(graph, f"{weight.name}.{part}", t) for part, t in quantised.tensors().items()]


class QuantisedWeight:
    """The tensors of one quantised weight, evaluated together and kept only until each was asked for.

    Args:
        weight: [K,N], or with `rows` [N,K]; float32, float16 or bfloat16.
        quantisation: bits, block size, symmetry.
        hessian: [K,K] of the inputs that the weight is multiplied with, for GPTQ; without one, rounding is to the
            nearest instead. So it is for an embedding that is not the head's, which is multiplied with nothing, and
            for all weights of `--tune`, which only times them.
        rows: Blocks run along the last axis, and the integers are stored without blocks: [N, K * bits / 8].
    """

    def __init__(
        self, weight: ir.TensorProtocol, quantisation: Quantisation, *, rows: bool = False, hessian: Array | None = None
    ) -> None:
        self.weight = weight
        self.hessian = hessian
        self.quantisation = quantisation.without_text if hessian is None else quantisation
        self.rows = rows
        self.waiting: dict[str, Array] = {}
        self.lock = threading.Lock()  # tensors are written by several threads

    def tensors(self) -> dict[str, ir.LazyTensor]:
        """`quantised` uint8, `scales` in the weight's dtype, and with asymmetric blocks `zero_points` uint8."""
        inputs, outputs = self._sizes()
        bits, size = self.quantisation.bits, self.quantisation.block_size
        blocks = -(-inputs // size)
        shapes = {
            "quantised": (outputs, inputs * bits // 8) if self.rows else (outputs, blocks, size * bits // 8),
            "scales": (outputs, blocks),
            "zero_points": (outputs, -(-blocks * bits // 8)),
        }
        if self.quantisation.symmetric:
            del shapes["zero_points"]
        return {
            part: ir.LazyTensor(
                partial(self._take, part),
                self.weight.dtype if part == "scales" else ir.DataType.UINT8,
                ir.Shape(shape),
                name=f"{self.weight.name}.{part}",
            )
            for part, shape in shapes.items()
        }

    def _sizes(self) -> tuple[int, int]:
        """K, N."""
        first, second = self.weight.shape.numpy()
        return (second, first) if self.rows else (first, second)

    def _take(self, part: str) -> ir.TensorProtocol:
        with self.lock:
            if part not in self.waiting:
                self.waiting = self._evaluate()
            return ir.Tensor(self.waiting.pop(part))

    def _evaluate(self) -> dict[str, Array]:
        stored = self.weight.numpy()
        weight = stored.T if self.rows else stored
        inputs, outputs = weight.shape
        step = max(1, PIECE // inputs)
        kernel_dtype = np.float16 if stored.dtype == np.float16 else np.float32
        reads = self.quantisation.rounding.reads_text
        factor = inverse_factor(_widened(self.hessian, inputs)) if reads and self.hessian is not None else None
        pieces = [
            round_weight(
                np.ascontiguousarray(weight[:, start : start + step], dtype=kernel_dtype), self.quantisation, factor
            )
            for start in range(0, outputs, step)
        ]
        integers = np.concatenate([piece.values for piece in pieces])
        scales = np.concatenate([piece.scales for piece in pieces])
        zero_points = np.concatenate([piece.zero_points for piece in pieces])
        if self.rows:
            integers = np.ascontiguousarray(integers.reshape(outputs, -1)[:, : inputs * self.quantisation.bits // 8])
        parts = {"quantised": integers, "scales": scales.astype(stored.dtype, copy=False)}
        return parts if self.quantisation.symmetric else parts | {"zero_points": zero_points}


def _widened(hessian: Array, inputs: int) -> Array:
    """[K,K] with zeros for the inputs that aligned widths add: they meet weights that are zero."""
    return np.pad(hessian, (0, inputs - len(hessian)))


def _attributes(quantisation: Quantisation) -> dict[str, int]:
    return {"bits": quantisation.bits, "block_size": quantisation.block_size}


def _name(value: ir.Value | None) -> str:
    return (value and value.name) or ""


def _weight(node: ir.Node) -> ir.Value | None:
    """The two-dimensional constant that `node` multiplies by or gathers from."""
    position = {"MatMul": 1, "Gather": 0}.get(node.op_type)
    value = None if position is None else node.inputs[position]
    if value is None or value.const_value is None or not value.is_initializer() or len(value.const_value.shape) != 2:
        return None
    return value
