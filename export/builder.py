"""The builder that the translation uses: inputs and outputs, named nodes, parameters, constants, masks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from dispc.export.semantic import RotaryTables
from dispc.model.checkpoint import Checkpoint
from dispc.model.family import HEAD
from dispc.model.weights import LazyWeight
from dispc.support.dtypes import name_of
from dispc.support.graph import add_initializer, make_node, scope

OPSET = 23
Node = Any
"""A torch.fx node. Typed as such, every use of an argument would need an assertion."""


Emitted = ir.Value | Sequence[ir.Value]
"""What stands for an FX node in the graph: a value, or those of an operator with several outputs."""


class GraphBuilder:
    """The graph so far.

    `values` maps FX nodes to IR values (parameters to their names), `origins` a node that changes nothing to the node
    it repeats, and `flat` holds the nodes that the model computes with batch and sequence as one axis.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        rotary_tables: Sequence[RotaryTables],
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.rotary_tables = rotary_tables
        self.values: dict[Node, Any] = {}
        self.origins: dict[Node, Node] = {}
        self.flat: set[Node] = set()
        self.names: dict[str, int] = {}
        config = checkpoint.config
        batch, sequence = "batch_size", "sequence_length"
        past, total = "past_sequence_length", "total_sequence_length"
        integers, floats = ir.TensorType(ir.DataType.INT64), ir.TensorType(from_torch_dtype(dtype))

        def tensor(name: str, type: ir.TensorType, *shape: str | int) -> ir.Value:
            return ir.Value(name=name, type=type, shape=ir.Shape(shape))

        self.input_ids = tensor("input_ids", integers, batch, sequence)
        self.attention_mask = tensor("attention_mask", integers, batch, total)
        self.position_ids = tensor("position_ids", integers, batch, sequence)
        names = [f"{i}.{part}" for i in range(len(config.templates)) for part in ("key", "value")]
        cache = (config.num_key_value_heads, config.head_dim)
        self.past = [tensor(f"past_key_values.{n}", floats, batch, cache[0], past, cache[1]) for n in names]
        self.outputs = [tensor("logits", floats, batch, sequence, config.vocab_size)] + [
            tensor(f"present.{n}", floats, batch, cache[0], total, cache[1]) for n in names
        ]
        self.graph = ir.Graph(
            [self.input_ids, self.attention_mask, self.position_ids, *self.past],
            [],
            nodes=[],
            opset_imports={"": OPSET},
            name="dispc",
        )

    def finish(self, results: list[Node]) -> None:
        """Return the values of `results` under the names, shapes and types of the artifact's interface."""
        for result, output in zip(results, self.outputs, strict=True):
            value = self.values[result]
            value.name, value.shape, value.type = output.name, output.shape, output.type
            self.graph.outputs.append(value)

    def module(self, node: Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        path = path.removeprefix("traced").removeprefix(".")
        return HEAD.removesuffix(".weight") if path == self.checkpoint.family.head else path

    def _name(self, node: Node, op_type: str) -> str:
        name = f"{scope(self.module(node))}/{op_type}"
        self.names[name] = count = self.names.get(name, -1) + 1
        return f"{name}_{count}" if count else name

    def emit(self, node: Node, op_type: str, inputs: list[ir.Value | None], **attributes: object) -> ir.Value:
        """Append a node named after the module that `node` was traced in; returns its output."""
        return self.emit_all(node, op_type, inputs, 1, **attributes)[0]

    def emit_all(
        self, node: Node, op_type: str, inputs: list[ir.Value | None], outputs: int, **attributes: object
    ) -> Sequence[ir.Value]:
        """The same for an operator with several outputs."""
        made = make_node(op_type, inputs, self._name(node, op_type), attributes=attributes, outputs=outputs)
        self.graph.append(made)
        return made.outputs

    def same(self, node: Node, origin: Node) -> Emitted:
        """The value of `node` is the value of `origin`."""
        self.origins[node] = origin
        value: Emitted = self.values[origin]
        return value

    def origin(self, node: Node) -> Node:
        while node in self.origins:
            node = self.origins[node]
        return node

    def constant(self, name: str, value: Any, dtype: Any = np.int64) -> ir.Value:
        return add_initializer(self.graph, name, np.array(value, dtype=dtype))

    def tensor(self, name: str, value: torch.Tensor) -> ir.Value:
        return add_initializer(self.graph, name, ir.tensor_adapters.TorchTensor(value))

    def parameter(self, node: Node, transpose: bool = False, offset: float = 0.0) -> ir.Value:
        """The initializer of a parameter, bound to the checkpoint; `offset` is added to what is stored there."""
        name = self.values[node].removeprefix("traced.")
        family = self.checkpoint.family
        embedding = f"{family.embedding}.weight"
        name = HEAD if name == f"{family.head}.weight" else name
        if self.checkpoint.config.tied and name in (embedding, HEAD):
            name = HEAD if transpose else embedding
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        shape = tuple(int(size) for size in node.meta["val"].shape)
        weight = LazyWeight(self.checkpoint.find(name).expect(shape)).add(offset).cast(self.dtype)
        return add_initializer(self.graph, name, weight.transpose() if transpose else weight)

    def operand(self, node: Node, argument: Any) -> ir.Value:
        """An elementwise operand: a tensor, or a Python number as a scalar of the model's dtype."""
        if isinstance(argument, torch.fx.Node):
            value = self.values[argument]
            return self.parameter(argument) if isinstance(value, str) else value
        dtype = node.meta["val"].dtype
        name = f"scalar.{argument}.{name_of(dtype)}"
        return self.tensor(name, torch.tensor(argument, dtype=dtype))

    def mask(self, window: int) -> ir.Value:
        """bool [B,1,S,T]: causal, within the window, and no padding. A token always sees itself, so that no row of
        the softmax is empty (padding rows would be NaN and poison later blocks)."""
        output = f"/mask{f'/window_{window}' if window else ''}/And_output"
        for existing in self.graph:
            if existing.outputs[0].name == output:
                return existing.outputs[0]
        prefix = output.removesuffix("/And_output")
        first = self.graph[0]  # before everything: the blocks share it

        def op(op_type: str, inputs: list[ir.Value | None], suffix: str = "", **attributes: object) -> ir.Value:
            made = make_node(op_type, inputs, f"{prefix}/{op_type}{suffix}", attributes=attributes)
            self.graph.insert_before(first, made)
            return made.outputs[0]

        zero, one = self.constant("int.0", 0), self.constant("int.1", 1)
        total = op("Squeeze", [op("Shape", [self.attention_mask], "_total", start=1, end=2)], "_total")
        new = op("Squeeze", [op("Shape", [self.input_ids], "_new", start=1, end=2)], "_new")
        keys = op("Range", [zero, total, one], "_keys")
        queries = op("Range", [op("Sub", [total, new]), total, one], "_queries")
        queries = op("Unsqueeze", [queries, self.constant("axes.1", [1])], "_queries")
        allowed = op("LessOrEqual", [keys, queries])
        if window:
            oldest = op("Sub", [queries, self.constant(f"int.{window}", window)], "_oldest")
            allowed = op("And", [allowed, op("Greater", [keys, oldest])], "_window")
        valid = op("Cast", [self.attention_mask], to=ir.DataType.BOOL)
        valid = op("Unsqueeze", [valid, self.constant("axes.1_2", [1, 2])], "_valid")
        return op("And", [allowed, op("Or", [valid, op("Equal", [keys, queries])])])
