"""Norms: what a family's norms compute and how its modules spell it, for the trace, the passes and the reference."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The norms of a family; all norms of a model are of one kind.

    ::

        rms     y = x / sqrt(mean(x^2) + epsilon) * weight
        layer   y = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight (+ bias, where the module has one)

    `modules` is how the names of their classes end, `epsilon` the attribute that holds it. With `one_plus` a checkpoint
    stores weight - 1.
    """

    kind: Literal["rms", "layer"] = "rms"
    modules: str = "RMSNorm"
    epsilon: str = "variance_epsilon"
    one_plus: bool = False

    def describes(self, module: object) -> bool:
        """Whether a module of a transformers model is one of these norms."""
        return type(module).__name__.endswith(self.modules)

    def epsilon_of(self, module: Any) -> float:
        """The epsilon of one norm."""
        return float(getattr(module, self.epsilon))

    @property
    def offset(self) -> float:
        """What is added to a stored weight."""
        return 1.0 if self.one_plus else 0.0


RMS = Norm()
RMS_ONE_PLUS = Norm(epsilon="eps", one_plus=True)
LAYER = Norm(kind="layer", modules="LayerNorm", epsilon="eps")
LAYER_ONE_PLUS = Norm(kind="layer", modules="LayerNorm1P", epsilon="eps", one_plus=True)
LAYER_COHERE = Norm(kind="layer", modules="LayerNorm", epsilon="variance_epsilon")
