"""The residual add and the norm after it as one node."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, RewriteRuleClassBase

from dispc.masks import Masks
from dispc.model.config import DecoderConfig
from dispc.passes.common.patterns import PatternPass
from dispc.support.graph import MICROSOFT, WRITE


class _SkipNorm(RewriteRuleClassBase):  # type: ignore[misc]
    """The operator of a norm, and that of the same norm of a sum."""

    norm: ClassVar[str]
    skip: ClassVar[str]

    def of_sum(self, op: Any, stream: Any, update: Any, *weights: Any) -> Any:
        total = op.Add(stream, update)
        return getattr(op, self.norm)(total, *weights, _allow_other_attributes=True, _outputs=["normed"]), total

    def check(self, context: Any, normed: ir.Value, **_: Any) -> bool:
        norm = normed.producer()
        return norm is not None and _reads_a_write(norm)

    def rewrite(
        self,
        op: Any,
        stream: ir.Value,
        update: ir.Value,
        gamma: ir.Value,
        normed: ir.Value,
        beta: ir.Value | None = None,
    ) -> Any:
        weights = (gamma,) if beta is None else (gamma, beta)
        make = getattr(op, self.skip)
        outputs = make(stream, update, *weights, epsilon=_epsilon(normed), _domain=MICROSOFT, _outputs=4)
        return outputs[0], outputs[3]


class _SkipRms(_SkipNorm):
    norm, skip = "RMSNormalization", "SkipSimplifiedLayerNormalization"

    def pattern(self, op: Any, stream: Any, update: Any, gamma: Any) -> Any:
        return self.of_sum(op, stream, update, gamma)


class _SkipLayerWithoutBias(_SkipRms):
    norm, skip = "LayerNormalization", "SkipLayerNormalization"


class _SkipLayer(_SkipNorm):
    norm, skip = "LayerNormalization", "SkipLayerNormalization"

    def pattern(self, op: Any, stream: Any, update: Any, gamma: Any, beta: Any) -> Any:
        return self.of_sum(op, stream, update, gamma, beta)


def _reads_a_write(norm: ir.Node) -> bool:
    """Whether a norm reads the add of a sub-layer's output (not that of OPT's positions, before all blocks)."""
    add = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    return add is not None and (add.name or "").endswith(f"{WRITE}Add")


def _epsilon(normed: ir.Value) -> float:
    node = normed.producer()
    assert node is not None
    return node.attributes["epsilon"].as_float()


class FuseSkipNormPass(PatternPass):
    """The add of a sub-layer's output to the residual stream and the norm that reads the sum become one node.

    Before::

        stream, update -> Add -> norm -> normed
                           `-> the next sub-layer's Add

    After (RMS norm; SkipLayerNormalization for layer norm)::

        stream, update -> SkipSimplifiedLayerNormalization -> normed, sum
                                                               sum -> the next sub-layer's add

    1. The parallel block (Phi) adds twice before one norm: the second add is fused, the first stays. Where two
       norms read one sum (Pythia), the add is fused with one of them.
    2. Nothing to fuse where a norm reads a gathered part of the stream (norm scope `selected`), or where ScatterND or
       ScatterElements makes the sum.
    """

    name = "fuse-skip-norm"

    def __init__(self, config: DecoderConfig, masks: Masks, *, adds: bool) -> None:
        """`masks` are those that are left to be selected; `adds` says whether every write ends in an Add."""
        super().__init__()
        self.config = config
        self.masks = masks
        self.adds = adds

    def rules(self) -> Sequence[RewriteRule]:
        return [kind.rule() for kind in (_SkipRms, _SkipLayer, _SkipLayerWithoutBias)]

    def expected(self, model: ir.Model) -> int:
        """Every add of a write that a norm reads."""
        return len(set(self._adds_before_norms()))

    def _adds_before_norms(self) -> Iterator[str]:
        """Which write's Add each norm reads, followed through the blocks; norms that read none are left out."""
        family, width = self.config.family, self.masks.hidden_size
        stream: str | None = None  # the write whose Add made the stream
        for number, block in enumerate(self.masks.blocks):
            entering = stream
            for name, layer in block.sub_layers.items():
                names = family.sub_layers[name]
                if not layer.alive:
                    continue
                source = entering if self.config.parallel else stream
                whole = self.masks.norm_scope == "full" or len(layer.read) == width
                if names.before is not None and whole and source is not None:
                    yield source
                stream = f"{number}.{names.write}" if self.adds or len(layer.write) == width else None
        if stream is not None:
            yield stream

    def rewrite(self, model: ir.Model) -> int:
        count = super().rewrite(model)
        for norm in model.graph:
            if norm.op_type in ("RMSNormalization", "LayerNormalization") and norm.inputs[0] is not None:
                made = norm.inputs[0].producer()
                self.leave(norm.name, f"reads what {made.name if made else 'an input'} makes, no add of a write")
        return count
