"""Store a tied embedding once: the LM head multiplies by the embedding's transpose."""

import onnx_ir as ir

from dispc.model.family import HEAD
from dispc.passes.base import RewritePass
from dispc.support.errors import CompileError
from dispc.support.graph import MICROSOFT, make_node, replace_node


class TieEmbeddingsPass(RewritePass):
    """The LM head reads the embedding [V,d] instead of a transposed copy of it [d,V].

    Before::

        input_ids -> Gather(embedding [V,d]) ...  normed -> MatMul(., lm_head [d,V]) -> logits

    After::

        input_ids -> Gather(embedding [V,d]) ...  normed -> FusedMatMul(., embedding [V,d], transB=1) -> logits

    1. With standard operators only, Transpose(embedding) -> MatMul says the same; ONNX Runtime folds or fuses it.
    """

    name = "tie-embeddings"
    option_names = ("contrib",)

    def __init__(self, embedding: str, *, contrib: bool) -> None:
        super().__init__()
        self.embedding = f"{embedding}.weight"
        self.contrib = contrib

    def expected(self, model: ir.Model) -> int:
        """One: the pass is only for models whose LM head is the embedding."""
        return 1

    def rewrite(self, model: ir.Model) -> int:
        graph = model.graph
        if HEAD not in graph.initializers:
            return 0
        head, embedding = graph.initializers[HEAD], graph.initializers[self.embedding]
        (use,) = head.uses()
        matmul = use.node
        if matmul.op_type != "MatMul" or matmul.inputs[1] is not head:
            raise CompileError(f"{matmul.name}: multiplies by {HEAD} in a way that cannot be tied")
        if self.contrib:
            name = f"{(matmul.name or '').rpartition('/')[0]}/FusedMatMul"
            fused = make_node(
                "FusedMatMul",
                [matmul.inputs[0], embedding],
                name,
                domain=MICROSOFT,
                attributes={"transB": 1, "alpha": 1.0},
            )
            replace_node(graph, matmul, fused)
            graph.opset_imports[MICROSOFT] = 1
        else:
            turn = make_node("Transpose", [embedding], "/lm_head/Transpose", attributes={"perm": [1, 0]})
            graph.insert_before(matmul, turn)
            matmul.replace_input_with(1, turn.outputs[0])
        return 1
