"""Repeat the traced blocks until the model has all of its blocks."""

import onnx_ir as ir

from dispc.model.checkpoint import Checkpoint
from dispc.model.family import Family
from dispc.model.weights import LazyWeight
from dispc.passes.base import RewritePass
from dispc.support.errors import CompileError
from dispc.support.graph import drop_unused_initializers, scope


class UnrollPass(RewritePass):
    """One traced block per kind becomes the model's full depth.

    Before (one kind, three blocks)::

        Gather(embedding) -> [layers.0: past.0 -> present.0] -> norm -> lm_head

    After::

        Gather(embedding) -> [layers.0: past.0 -> present.0] -> [layers.1: ...] -> [layers.2: ...] -> norm -> lm_head

    1. Template t holds the nodes under the scope of traced block t; kinds are numbered by first appearance.
    2. Block i copies the template of its kind: names and weights of block t become those of block i, caches likewise.
    3. Values from outside the blocks (the mask, graph inputs, shared constants) are shared by all copies.
    """

    name = "unroll"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.checkpoint = checkpoint

    def expected(self, model: ir.Model) -> int:
        return self.checkpoint.config.num_hidden_layers

    def rewrite(self, model: ir.Model) -> int:
        graph, config = model.graph, self.checkpoint.config
        kinds = [config.layer_kinds[index] for index in config.templates]
        templates = [Template(graph, config.family, number) for number in range(len(kinds))]
        inside = {node for template in templates for node in template.nodes}
        output = templates[-1].output
        readers = [(use.node, use.idx) for use in output.uses() if use.node not in inside]

        residual = templates[0].residual
        copies = []
        for index, kind in enumerate(config.layer_kinds):
            copies.append(BlockCopy(templates[kinds.index(kind)], index, residual, self.checkpoint))
            residual = copies[-1].output

        for node, position in readers:
            node.replace_input_with(position, residual)
        del graph.inputs[-2 * len(kinds) :]
        del graph.outputs[1:]
        graph.remove(list(inside), safe=True)
        drop_unused_initializers(graph)
        for copy in copies:
            for node in copy.nodes:
                graph.insert_before(readers[0][0], node)
            for value in copy.initializers.values():
                graph.register_initializer(value)
            graph.inputs.extend(copy.pasts)
            graph.outputs.extend(copy.presents)
        return len(copies)


class Template:
    """The nodes of traced block `number`, and the values through which the residual stream enters and leaves it."""

    def __init__(self, graph: ir.Graph, family: Family, number: int) -> None:
        self.number = number
        self.module = family.block(number)
        self.nodes = [node for node in graph if (node.name or "").startswith(scope(self.module) + "/")]
        entrance = family.sub_layers["attention"].before or family.query
        entering = [
            node for node in self.nodes if (node.name or "").startswith(scope(f"{self.module}.{entrance}") + "/")
        ]
        if not entering or entering[0].inputs[0] is None:
            raise CompileError(f"{self.module}: has no {entrance}")
        self.residual = entering[0].inputs[0]
        inside = set(self.nodes)
        leaving = [
            value
            for node in self.nodes
            for value in node.outputs
            if any(use.node not in inside for use in value.uses())
        ]
        if len(leaving) != 1:
            raise CompileError(f"{self.module}: one value must leave the block, found {[v.name for v in leaving]}")
        self.output = leaving[0]


class BlockCopy:
    """Block `index` made from a template: detached nodes, initializers and caches, reading `residual`."""

    def __init__(self, template: Template, index: int, residual: ir.Value, checkpoint: Checkpoint) -> None:
        self.module = checkpoint.family.block(index)
        self.checkpoint = checkpoint
        self.initializers: dict[str, ir.Value] = {}
        self.pasts: list[ir.Value] = []
        self.presents: list[ir.Value] = []
        self.values: dict[ir.Value, ir.Value] = {template.residual: residual}
        self.prefixes = (
            (f"{scope(template.module)}/", f"{scope(self.module)}/"),
            (f"{template.module}.", f"{self.module}."),
            (f"past_key_values.{template.number}.", f"past_key_values.{index}."),
            (f"present.{template.number}.", f"present.{index}."),
        )
        self.nodes = [self._copy(node) for node in template.nodes]
        self.output = self.values[template.output]

    def _copy(self, node: ir.Node) -> ir.Node:
        outputs = []
        for value in node.outputs:
            copy = ir.Value(name=self._name(value.name), shape=value.shape, type=value.type)
            self.values[value] = copy
            outputs.append(copy)
            if value.is_graph_output():
                self.presents.append(copy)
        return ir.Node(
            node.domain,
            node.op_type,
            [self._input(value) for value in node.inputs],
            node.attributes.values(),
            outputs=outputs,
            name=self._name(node.name),
            metadata_props=dict(node.metadata_props),
        )

    def _input(self, value: ir.Value | None) -> ir.Value | None:
        if value is None or value in self.values:
            return value and self.values[value]
        name = self._name(value.name)
        if value.is_graph_input() and name.startswith("past_key_values."):
            copy = ir.Value(name=name, shape=value.shape, type=value.type)
            self.pasts.append(copy)
        elif value.is_initializer() and name.startswith(f"{self.module}."):
            assert isinstance(value.const_value, LazyWeight)
            weight = value.const_value.rebase(self.checkpoint.find(name))
            copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=weight)
            self.initializers[name] = copy
        else:
            return value  # from outside the blocks: shared
        self.values[value] = copy
        return copy

    def _name(self, name: str | None) -> str:
        name = name or ""
        for before, after in self.prefixes:
            if name.startswith(before):
                return after + name.removeprefix(before)
        return name
