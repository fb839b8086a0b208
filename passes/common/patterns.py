"""Local fusions by pattern: onnxscript's matcher finds and replaces, dispc counts and names."""

from abc import abstractmethod
from collections.abc import Sequence

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, RewriteRuleSet

from dispc.passes.base import RewritePass
from dispc.support.graph import MICROSOFT

RULE = "pkg.onnxscript.rewriter.rule_name"
"""Metadata key by which onnxscript marks the nodes it made."""


class PatternPass(RewritePass):
    """A pass that applies rewrite rules; the nodes they make are named after the module that they replace a part of."""

    @abstractmethod
    def rules(self) -> Sequence[RewriteRule]:
        """The rules, the first that matches wins."""

    def rewrite(self, model: ir.Model) -> int:
        count = int(RewriteRuleSet(self.rules()).apply_to_model(model))
        for node in model.graph:
            if node.metadata_props.pop(RULE, None) is None:
                continue
            module = (node.outputs[0].name or "").rpartition("/")[0]
            node.name = f"{module}/{node.op_type}"
            for value in node.outputs[1:]:
                if value.name and not value.is_graph_output():  # whose name is the model's interface
                    value.name = f"{node.name}_{value.name}"
        if count:
            model.graph.opset_imports[MICROSOFT] = 1
        return count
