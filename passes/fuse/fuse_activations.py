"""Activations as the operators that ONNX Runtime has one kernel for."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, RewriteRuleClassBase

from dispc.passes.common.patterns import PatternPass
from dispc.support.graph import MICROSOFT


class _Silu(RewriteRuleClassBase):  # type: ignore[misc]
    def pattern(self, op: Any, x: Any) -> Any:
        return op.Mul(x, op.Sigmoid(x))

    def rewrite(self, op: Any, x: ir.Value) -> Any:
        return op.QuickGelu(x, alpha=1.0, _domain=MICROSOFT)


class _BiasGelu(RewriteRuleClassBase):  # type: ignore[misc]
    def pattern(self, op: Any, x: Any, bias: Any) -> Any:
        return op.Gelu(op.Add(x, bias), approximate="none")

    def check(self, context: Any, bias: ir.Value, **_: Any) -> bool:
        return bias.is_initializer()

    def rewrite(self, op: Any, x: ir.Value, bias: ir.Value) -> Any:
        return op.BiasGelu(x, bias, _domain=MICROSOFT)


class _FastGelu(_BiasGelu):
    def pattern(self, op: Any, x: Any, bias: Any) -> Any:
        return op.Gelu(op.Add(x, bias), approximate="tanh")

    def rewrite(self, op: Any, x: ir.Value, bias: ir.Value) -> Any:
        return op.FastGelu(x, bias, _domain=MICROSOFT)


class FuseActivationsPass(PatternPass):
    """SiLU and biased GELU become one node each.

    Before::

        gate -> Sigmoid -> Mul(gate, .)
        fc1 -> Add(bias) -> Gelu(approximate="none")
        fc1 -> Add(bias) -> Gelu(approximate="tanh")

    After::

        gate -> QuickGelu(alpha=1)
        fc1 -> BiasGelu(., bias)
        fc1 -> FastGelu(., bias)

    1. QuickGelu is x * sigmoid(alpha x); FastGelu is the tanh form. A Gelu without a bias and Relu have kernels as they
       are.
    """

    name = "fuse-activations"

    def rules(self) -> Sequence[RewriteRule]:
        return [kind.rule() for kind in (_Silu, _BiasGelu, _FastGelu)]

    def rewrite(self, model: ir.Model) -> int:
        count = super().rewrite(model)
        for node in model.graph:
            if node.op_type == "Gelu":
                self.leave(node.name, "has no bias in front that is a constant")
        return count

    def expected(self, model: ir.Model) -> int:
        """Every Sigmoid, and every Gelu that an Add of an initializer feeds."""
        return sum(node.op_type == "Sigmoid" or (node.op_type == "Gelu" and _biased(node)) for node in model.graph)


def _biased(gelu: ir.Node) -> bool:
    add = gelu.inputs[0].producer() if gelu.inputs[0] is not None else None
    return add is not None and add.op_type == "Add" and any(v is not None and v.is_initializer() for v in add.inputs)
