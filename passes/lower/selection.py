"""What the passes of a lowering have in common: each replaces every read or write of a part of the stream."""

from abc import abstractmethod
from collections.abc import Sequence
from importlib import import_module
from typing import Generic, TypeVar

import onnx_ir as ir

from dispc.masks import Masks
from dispc.passes.base import RewritePass

Site = TypeVar("Site")


class SelectionPass(RewritePass, Generic[Site]):
    """A pass of a lowering (a row of `dispc.lowerings`). Subclasses implement `expected`, `find` and `replace`.

    All of them are made alike: `masks` are the sets that are left to be selected, written widths may be padded to
    `multiple`.
    """

    def __init__(self, masks: Masks, multiple: int = 8) -> None:
        super().__init__()
        self.masks = masks
        self.multiple = multiple

    @abstractmethod
    def find(self, graph: ir.Graph) -> Sequence[Site]:
        """Every place to rewrite."""

    @abstractmethod
    def replace(self, graph: ir.Graph, site: Site) -> None:
        """Rewrite one of them."""

    def rewrite(self, model: ir.Model) -> int:
        sites = self.find(model.graph)
        for site in sites:
            self.replace(model.graph, site)
        return len(sites)


def find_pass(name: str) -> type[SelectionPass[object]]:
    """The pass called `name`: `inverse-gather` is the class of that name in the module `inverse_gather` beside."""
    module = import_module(f"dispc.passes.lower.{name.replace('-', '_')}")
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, SelectionPass)]
    return next(kind for kind in kinds if getattr(kind, "name", None) == name)
