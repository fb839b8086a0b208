"""Which versions a graph needs: the lowest opset that spells it, and the first ONNX Runtime that runs it.

The opset is read off ONNX's own schemas. What a graph needs beyond it is in `KERNELS`, a row for each operator, tried
with the versions named here and those before them (`make test-runtimes`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from dispc.manifest import Needs
from dispc.support.dtypes import type_string
from dispc.support.errors import CompileError
from dispc.support.graph import MACHINE_LEARNING, MICROSOFT, SIMPLIFIED_NORM


@dataclass(frozen=True, kw_only=True)
class Release:
    """A version of ONNX: its IR version, and the first ONNX Runtime that reads it."""

    ir_version: int
    onnxruntime: str


RELEASES = {
    21: Release(ir_version=10, onnxruntime="1.18"),
    22: Release(ir_version=10, onnxruntime="1.21"),
    23: Release(ir_version=10, onnxruntime="1.23"),
}
"""Opset -> what it needs. None is lower than 21: GroupQueryAttention has a CPU kernel since the ONNX Runtime that reads
it, and dispc is tried with none older."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """An operator, used as `when` says: the first ONNX Runtime whose CPU kernel is right.

    Every operator outside of the standard has a row, those of the standard only where they need more than their opset.
    `because` says what was seen of the version before.
    """

    op_type: str
    onnxruntime: str
    domain: str = MICROSOFT
    when: Callable[[ir.Node], bool] = lambda node: True
    because: str = ""


def _takes(position: int) -> Callable[[ir.Node], bool]:
    return lambda node: len(node.inputs) > position and node.inputs[position] is not None


def _number(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def _windowed(node: ir.Node) -> bool:
    return _number(node, "local_window_size") > 0


def _capped(node: ir.Node) -> bool:
    return "softcap" in node.attributes and node.attributes["softcap"].as_float() > 0


def _rounds(node: ir.Node) -> bool:
    """Activations to int8."""
    return _number(node, "accuracy_level") == 4


def _bytes(node: ir.Node) -> bool:
    return _number(node, "bits") == 8


def _only_weights(node: ir.Node) -> bool:
    return _bytes(node) and not _rounds(node)


OLDEST = RELEASES[min(RELEASES)].onnxruntime
KERNELS = (
    Kernel(op_type="Attention", domain="", onnxruntime="1.24", because="refused an empty past that has no memory"),
    Kernel(op_type="Attention", domain="", onnxruntime="1.27", when=_capped, because="capped wrongly, silently"),
    Kernel(
        op_type="LayerNormalization",
        domain="",
        onnxruntime="1.19",
        when=lambda node: not _takes(2)(node),
        because="crashed where there is no bias",
    ),
    Kernel(op_type=SIMPLIFIED_NORM, domain="", onnxruntime=OLDEST),
    Kernel(op_type="SkipSimplifiedLayerNormalization", onnxruntime=OLDEST),
    Kernel(op_type="SkipLayerNormalization", onnxruntime=OLDEST),
    Kernel(op_type="RotaryEmbedding", onnxruntime=OLDEST),
    Kernel(op_type="QuickGelu", onnxruntime=OLDEST),
    Kernel(op_type="FastGelu", onnxruntime=OLDEST),
    Kernel(op_type="BiasGelu", onnxruntime=OLDEST),
    Kernel(op_type="FusedMatMul", onnxruntime=OLDEST),
    Kernel(op_type="ArrayFeatureExtractor", domain=MACHINE_LEARNING, onnxruntime=OLDEST),
    Kernel(op_type="GroupQueryAttention", onnxruntime=OLDEST),
    Kernel(op_type="GroupQueryAttention", onnxruntime="1.20", when=_capped, because="had no softcap"),
    Kernel(op_type="GroupQueryAttention", onnxruntime="1.22", when=_takes(10), because="had no attention_bias"),
    Kernel(op_type="GroupQueryAttention", onnxruntime="1.24", when=_windowed, because="saw past the window, silently"),
    Kernel(op_type="MatMulNBits", onnxruntime=OLDEST),
    Kernel(op_type="MatMulNBits", onnxruntime="1.19", when=_rounds, because="rounded to other tokens"),
    Kernel(op_type="MatMulNBits", onnxruntime="1.22", when=_bytes, because="had no 8 bits"),
    Kernel(op_type="MatMulNBits", onnxruntime="1.23", when=_only_weights, because="had 8 bits with int8 activations"),
    Kernel(op_type="GatherBlockQuantized", onnxruntime="1.23", because="had no attribute `bits`"),
    Kernel(op_type="GatherBlockQuantized", onnxruntime="1.27", when=_takes(3), because="misread zero points, silently"),
)


def lowest_opset(nodes: Iterable[ir.Node]) -> int:
    """The lowest row of `RELEASES` in whose opset every node means what it means in the newest."""
    nodes = [node for node in nodes if node.domain == "" and node.op_type != SIMPLIFIED_NORM]
    return next(opset for opset in RELEASES if opset == max(RELEASES) or all(_fits(node, opset) for node in nodes))


def _fits(node: ir.Node, opset: int) -> bool:
    """Whether the operator's version in `opset` takes as many inputs, these attributes and these types."""
    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=opset, domain=node.domain)
    except onnx.defs.SchemaError:
        return False
    fits = len(node.inputs) <= schema.max_input and set(node.attributes) <= set(schema.attributes)
    constraints = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    for value, formal in zip(node.inputs, schema.inputs, strict=False):
        if value is not None and value.dtype is not None and formal.type_str in constraints:
            fits = fits and type_string(value.dtype) in constraints[formal.type_str]
    return fits


def needs(model: ir.Model) -> Needs:
    """The opset, the IR version, and the first ONNX Runtime that runs the graph.

    Raises:
        CompileError: for an operator outside of the standard without a row in `KERNELS`.
    """
    opset = model.opset_imports[""]
    versions = {RELEASES[opset].onnxruntime}
    for node in model.graph:
        rows = [row for row in KERNELS if (row.domain, row.op_type) == (node.domain, node.op_type)]
        if not rows and node.domain != "":
            raise CompileError(
                f"{node.name}: no row of KERNELS says which ONNX Runtime has {node.domain}.{node.op_type}"
            )
        versions |= {row.onnxruntime for row in rows if row.when(node)}
    return Needs(opset=opset, ir_version=model.ir_version or 0, onnxruntime=max(versions, key=version_key))


def version_key(version: str) -> tuple[int, ...]:
    """What versions such as `1.18` are ordered by."""
    return tuple(int(part) for part in version.split("."))
