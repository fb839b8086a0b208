"""Make every sub-layer read, work in and add into its own sets: the canonical form of a pruned model."""

from itertools import pairwise

import numpy as np
import onnx_ir as ir

from dispc.masks import Indices, Masks, NormScope, SubLayer
from dispc.model.weights import rebind, weight_of
from dispc.passes.base import BlockPass, ConditionError
from dispc.passes.common.blocks import BlockFinder, BlockParts, Projection, SubLayerParts
from dispc.passes.common.norms import recount
from dispc.support.errors import CompileError
from dispc.support.graph import READ, READS, WRITE, WRITES, add_initializer, make_node, remove_dead, scope


class PruneBlocksPass(BlockPass):
    """Dense sub-layers become Gather / narrow MatMul / ScatterND(add).

    Before, for each sub-layer (r is the residual stream [B,S,d])::

        r -> norm -> MatMul [d,m] -> ... -> MatMul [m,d] -> Add(r, .)

    After, `norm_scope="full"`::

        r -> norm -> Gather(read) -> MatMul [read,mid] -> ... -> MatMul [mid,write] -> ScatterND(r, write, ., add)

    and `norm_scope="selected"`::

        r -> Gather(read) -> norm [read] -> MatMul [read,mid] -> ...

    A norm after the sub-layer (Gemma 2 and 3, OLMo 2) stands between the last MatMul and the ScatterND, and runs over
    the written positions. With `full`, `recount` rescales its weight and epsilon to give what the norm over
    all d would give.

    1. A full read set has no Gather; a full write set is a plain Add.
    2. A sub-layer with an empty set is removed; a removed attention takes its cache with it, and the remaining caches
       are numbered without gaps.
    3. ScatterND indexes leading axes, so the canonical write is Transpose, ScatterND, Transpose.
    """

    name = "prune-blocks"

    def expected(self, model: ir.Model) -> int:
        """Two reads and two writes per block, less those of removed sub-layers."""
        parts = [part for block in self.masks.blocks for part in block.sub_layers.values()]
        return sum(2 if part.alive else 1 for part in parts)

    def ensures(self, model: ir.Model) -> None:
        """The projection weights that are left hold exactly the parameters that the masks keep."""
        suffixes = tuple(
            f".{name}.weight"
            for name in (
                *self.config.family.attention_reads,
                *self.config.family.mlp_reads,
                self.config.family.attention_out,
                self.config.family.down,
            )
        )
        weights = [value for name, value in model.graph.initializers.items() if name.endswith(suffixes)]
        kept = sum(value.const_value.size for value in weights if value.const_value is not None)
        if kept != self.masks.kept_parameters(self.config):
            raise ConditionError(
                f"pass {self.name} kept {kept} block parameters, "
                f"the masks keep {self.masks.kept_parameters(self.config)}"
            )

    def rewrite(self, model: ir.Model) -> int:
        graph = model.graph
        finder = BlockFinder(graph, self.config.family)
        blocks = [finder.find(index) for index in range(self.config.num_hidden_layers)]
        for previous, block in pairwise(blocks):
            if block.residual is not previous.output:
                raise CompileError(f"{block.attention.readers[0].name}: does not read what the block before it writes")
        stream, count = blocks[0].residual, 0
        for block in blocks:
            stream, rewrites = _BlockPruner(graph, block, self.masks).prune(stream)
            count += rewrites
        _renumber_caches(graph)
        return count


class _BlockPruner:
    """Prunes one block. Every sub-layer kept counts two rewrites (a read, a write), every one removed counts one."""

    def __init__(self, graph: ir.Graph, block: BlockParts, masks: Masks) -> None:
        self.graph = graph
        self.block = block
        self.norm_scope: NormScope = masks.norm_scope
        self.sets = masks.blocks[block.index]
        self.width = masks.hidden_size

    def prune(self, entering: ir.Value) -> tuple[ir.Value, int]:
        """Prune the block that reads the stream `entering`; returns the stream after it and the rewrites made."""
        block, sets = self.block, self.sets
        stream, count = entering, 0
        for name, part in block.sub_layers.items():
            part_sets = sets.sub_layers[name]
            if part_sets.alive:
                self._read(part, part_sets.read, entering if block.parallel else stream)
                self._narrow(part, part_sets)
                stream = self._write(part, part_sets.write, stream)
                count += 2
            else:
                count += 1
        if not sets.attention.alive:
            self._drop_cache()
        ir.convenience.replace_all_uses_with(block.output, stream)
        parts = block.sub_layers.values()
        ends = [part.update.producer() for part in parts] + [part.norm for part in parts]
        remove_dead(self.graph, [*reversed(block.adds), *(node for node in ends if node is not None)])
        return stream, count

    def _read(self, parts: SubLayerParts, read: Indices, stream: ir.Value) -> None:
        """Let the sub-layer's projections read its read set of the normalised stream."""
        name, full = scope(parts.module), len(read) == self.width
        norm, anchor = parts.norm, parts.reads[0].matmul
        if norm is None:
            source = stream if full else self._gather(stream, parts, read, anchor)
        elif self.norm_scope == "selected" and not full:
            selected = self._gather(stream, parts, read, anchor)
            inputs = [selected, *(self._narrow_norm(parts, value, read) for value in norm.inputs[1:])]
            made = make_node(norm.op_type, inputs, f"{name}{READ}{norm.op_type}", attributes=norm.attributes)
            self.graph.insert_before(anchor, made)
            source = made.outputs[0]
        else:
            if norm.inputs[0] is not stream:
                norm.replace_input_with(0, stream)
            source = norm.outputs[0] if full else self._gather(norm.outputs[0], parts, read, anchor)
        for projection in parts.reads:
            projection.matmul.replace_input_with(0, source)

    def _gather(self, source: ir.Value, parts: SubLayerParts, read: Indices, anchor: ir.Node) -> ir.Value:
        indices = add_initializer(self.graph, f"{parts.module}.read", read.astype(np.int32))
        node = make_node("Gather", [source, indices], f"{scope(parts.module)}{READ}Gather", attributes={"axis": -1})
        self.graph.insert_before(anchor, node)
        return node.outputs[0]

    def _narrow_norm(self, parts: SubLayerParts, value: ir.Value | None, read: Indices) -> ir.Value:
        """The norm's weight or bias on the read set; a norm shared by two sub-layers (Phi) is narrowed for each."""
        weight = weight_of(value).select(0, read)
        return add_initializer(self.graph, f"{parts.module}.read.{weight.source.name.rpartition('.')[2]}", weight)

    def _narrow(self, parts: SubLayerParts, sets: SubLayer) -> None:
        """Slice the weights: rows of [in, out] by what is read, columns by what is kept."""
        for projection in parts.reads:
            _slice(projection, rows=sets.read, columns=sets.mid)
        _slice(parts.write, rows=sets.mid, columns=sets.write)
        if parts.after and len(sets.write) < self.width:
            weight = parts.after.inputs[1]
            rebind(weight, weight_of(weight).select(0, sets.write))
            if self.norm_scope == "full":
                recount(parts.after, self.width, len(sets.write))

    def _write(self, parts: SubLayerParts, write: Indices, stream: ir.Value) -> ir.Value:
        """Add the sub-layer's output into its write set of the stream; returns the new stream."""
        name, update = scope(parts.module), parts.update
        nodes: list[ir.Node] = []

        def op(op_type: str, inputs: list[ir.Value | None], suffix: str = "", **attributes: object) -> ir.Value:
            nodes.append(make_node(op_type, inputs, f"{name}{WRITE}{op_type}{suffix}", attributes=attributes))
            return nodes[-1].outputs[0]

        if len(write) == self.width:
            result = op("Add", [stream, update])
        else:
            indices = add_initializer(self.graph, f"{parts.module}.write", write[:, None])
            turned = [op("Transpose", [v], s, perm=[2, 0, 1]) for v, s in ((stream, "_stream"), (update, "_update"))]
            added = op("ScatterND", [turned[0], indices, turned[1]], reduction="add")
            result = op("Transpose", [added], perm=[1, 2, 0])
        # The parallel block's first add stands after both sub-layers; a sequential one's directly after its update.
        anchor = update.producer()
        assert anchor is not None
        for node in nodes:
            self.graph.insert_after(anchor, node)
            anchor = node
        return result

    def _drop_cache(self) -> None:
        kernel = self.block.kernel
        caches = {id(value) for value in kernel.outputs[1:]}
        for output in [value for value in self.graph.outputs if id(value) in caches]:
            self.graph.outputs.remove(output)


def _slice(projection: Projection, rows: Indices | None, columns: Indices | None) -> None:
    value = projection.matmul.inputs[1]
    weight = weight_of(value)
    before = weight.sizes
    weight = weight if rows is None else weight.select(0, rows)
    weight = weight if columns is None else weight.select(1, columns)
    rebind(value, weight)
    after = weight.sizes
    projection.matmul.metadata_props[READS] = f"{after[0]} of {before[0]}"
    projection.matmul.metadata_props[WRITES] = f"{after[1]} of {before[1]}"
    if projection.bias is not None and columns is not None:
        bias = next(v for v in projection.bias.inputs if v is not None and v.is_initializer())
        rebind(bias, weight_of(bias).select(0, columns))


def _renumber_caches(graph: ir.Graph) -> None:
    """Drop the cache inputs that nothing reads any more, and number the remaining caches without gaps."""
    for value in [v for v in graph.inputs if (v.name or "").startswith("past_key_values.") and not v.uses()]:
        graph.inputs.remove(value)
    for values, prefix in ((graph.inputs, "past_key_values."), (graph.outputs, "present.")):
        caches = [value for value in values if (value.name or "").startswith(prefix)]
        for number, value in enumerate(caches):
            value.name = f"{prefix}{number // 2}.{'key' if number % 2 == 0 else 'value'}"
