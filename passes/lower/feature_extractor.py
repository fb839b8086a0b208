"""Spell selections as ArrayFeatureExtractor, for which ONNX Runtime's CPU has the faster kernel."""

import numpy as np
import onnx_ir as ir

from dispc.passes.common.canonical import find_selections, part_reads, part_writes
from dispc.passes.lower.selection import SelectionPass
from dispc.support.graph import EXTRACTOR, MACHINE_LEARNING, add_initializer, make_node, replace_node


class FeatureExtractorPass(SelectionPass[ir.Node]):
    """A Gather along the last axis becomes ai.onnx.ml.ArrayFeatureExtractor, which does the same.

    Before (of a read set, and of the inverse index of a write set)::

        x [B,S,d] -> Gather(., read int32 [k], axis=-1) -> [B,S,k]

    After::

        x [B,S,d] -> ArrayFeatureExtractor(., read int64 [k]) -> [B,S,k]

    1. The results are equal to the last bit. The kernel exists on the CPU in float32 only.
    2. ONNX Runtime's Gather copies one element at a time there; this kernel has a loop.
    """

    name = "feature-extractor"

    def expected(self, model: ir.Model) -> int:
        return part_reads(self.masks) + part_writes(self.masks)

    def find(self, graph: ir.Graph) -> list[ir.Node]:
        return find_selections(graph)

    def replace(self, graph: ir.Graph, site: ir.Node) -> None:
        indices = site.inputs[1]
        assert indices is not None and indices.const_value is not None and indices.name is not None
        wide = add_initializer(graph, f"{indices.name}.int64", indices.const_value.numpy().astype(np.int64))
        name = (site.name or "").removesuffix("Gather") + EXTRACTOR
        replace_node(graph, site, make_node(EXTRACTOR, [site.inputs[0], wide], name, domain=MACHINE_LEARNING))
        graph.opset_imports[MACHINE_LEARNING] = 1
