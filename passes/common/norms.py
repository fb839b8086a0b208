"""RMS norms that run over another number of positions than the one they were defined over."""

import math

import onnx_ir as ir

from dispc.model.weights import rebind, weight_of
from dispc.support.errors import CompileError


def recount(norm: ir.Node, before: int, after: int) -> None:
    """Let an RMS norm run over `after` positions and give what it gave over `before`; they differ by zeros.

    ::

        x / sqrt(sum(x^2) / before + e) * w  =  x / sqrt(sum(x^2) / after + e * before/after) * w * sqrt(before/after)

    Raises:
        CompileError: for another norm, whose mean would move.
    """
    if norm.op_type != "RMSNormalization":
        raise CompileError(f"{norm.name}: a {norm.op_type} after a sub-layer cannot run over some of the positions")
    share = before / after
    rebind(norm.inputs[1], weight_of(norm.inputs[1]).multiply(math.sqrt(share)))
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", norm.attributes["epsilon"].as_float() * share)
