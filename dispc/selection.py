"""Which parts of the stream are worth an index list, and which are better read and written whole: a cost model.

A set of nearly everything saves little: with zeros in the weights where it keeps nothing, the product is a little
larger and the selection goes. What pays depends on the width of the set and on the size of the products beside it, so
it is decided set by set.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from dispc.masks import Block, Masks, SubLayer
from dispc.model.config import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class SelectionCosts:
    """What a selection costs and what a weight costs, in nanoseconds; `dispc compile --tune` measures them.

    Args:
        call: A selection while decoding, whatever its width.
        element: Each element that it selects.
        weight: Each weight that is read while decoding.
        prompt_element: Each element selected, per token of a long prompt.
        prompt_weight: Each weight, per token of a long prompt: one multiplication and one addition.
    """

    call: float
    element: float
    weight: float
    prompt_element: float
    prompt_weight: float

    def cost(self, side: "Side", width: int) -> float:
        """Nanoseconds of selecting, for a token read and one decoded, in a stream `width` wide.

        A request reads at least as many tokens as it decodes; it is judged by one of each.
        """
        selected = side.width if side.name.endswith("read") else width
        return self.call + (self.element + self.prompt_element) * selected

    def saving(self, side: "Side", width: int) -> float:
        """Nanoseconds that the weights take which the selection saves, likewise."""
        return (self.weight + self.prompt_weight) * (width - side.width) * side.beside

    def pays(self, side: "Side", width: int) -> bool:
        """Whether to select, and not to multiply by zeros."""
        return self.saving(side, width) > self.cost(side, width)

    def reason(self, side: "Side", width: int) -> str:
        """Why, in words."""
        cost, saving = self.cost(side, width) / 1000, self.saving(side, width) / 1000
        return f"{side.width} of {width}: selecting costs {cost:.1f} us of two tokens, zeros would cost {saving:.1f}"


DEFAULT_COSTS = SelectionCosts(call=500.0, element=0.8, weight=0.14, prompt_element=0.35, prompt_weight=0.0095)
"""Of two cores of an AMD EPYC, measured by `dispc.runtime.costs` in float32 (docs/performance.md)."""


@dataclass(frozen=True)
class Side:
    """One read or write set that is neither empty nor full.

    `name` is as in `SETS`; `beside` is the other dimension of the products that read the set, or write it.
    """

    block: int
    name: str
    width: int
    beside: int


def sides(masks: Masks, config: DecoderConfig) -> Iterator[Side]:
    """The sets of living sub-layers that can be filled. A read before a norm (norm scope `selected`) cannot: the
    norm is over the read set."""
    for number, block in enumerate(masks.blocks):
        besides = widths_beside(block, config)
        for name, layer in block.sub_layers.items():
            before_norm = masks.norm_scope == "selected" and config.family.sub_layers[name].before is not None
            candidates = {"write": layer.write} | ({} if before_norm else {"read": layer.read})
            for side, indices in candidates.items() if layer.alive else ():
                if len(indices) < masks.hidden_size:
                    yield Side(number, f"{name}.{side}", len(indices), besides[f"{name}.{side}"])


def widths_beside(block: Block, config: DecoderConfig) -> dict[str, int]:
    """The other dimension of the product that reads or writes each set; several products side by side count as one."""
    mid = _mid(block.mlp)
    return {
        "attention.read": config.query_size + 2 * config.key_value_size,
        "attention.write": config.query_size,
        "mlp.read": len(config.family.mlp_reads) * mid,
        "mlp.write": mid,
    }


def sets_to_fill(masks: Masks, config: DecoderConfig, costs: SelectionCosts) -> frozenset[tuple[int, str]]:
    """The sets, by block and name, whose selection costs more than the weights that it saves."""
    return frozenset(
        (side.block, side.name) for side in sides(masks, config) if not costs.pays(side, masks.hidden_size)
    )


def fill_sets(masks: Masks, filled: frozenset[tuple[int, str]]) -> Masks:
    """The masks with those sets full: what the graph reads and writes once they are zeros in the weights."""
    everything = np.arange(masks.hidden_size, dtype=np.int64)
    blocks = [
        Block.from_sets({name: everything if (number, name) in filled else set_ for name, set_ in block.sets().items()})
        for number, block in enumerate(masks.blocks)
    ]
    return replace(masks, blocks=tuple(blocks))


def _mid(layer: SubLayer) -> int:
    assert layer.mid is not None
    return len(layer.mid)
