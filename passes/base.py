"""What every rewriting pass of dispc has in common: it knows how often it must apply, and fails when it did not."""

from abc import abstractmethod

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from dispc.manifest import spell_pass
from dispc.masks import Masks
from dispc.model.config import DecoderConfig
from dispc.support.errors import CompileError
from dispc.support.graph import drop_unused_initializers


class ConditionError(CompileError, PreconditionError, PostconditionError):
    """What `requires` and `ensures` raise: onnx_ir passes its own condition errors on and wraps all others."""


class RewritePass(InPlacePass):
    """A pass that counts its rewrites. Subclasses set `name`, and implement `expected` and `rewrite`.

    `option_names` are the attributes that hold its options: what it was given beside the model and its masks.
    """

    name: str
    option_names: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, str | int | bool]:
        return {name: getattr(self, name) for name in self.option_names}

    def __str__(self) -> str:
        """The name and the options, such as `align-widths{multiple=8}`."""
        return spell_pass(self.name, self.options)

    def __init__(self) -> None:
        super().__init__()
        self.left: list[str] = []

    @abstractmethod
    def expected(self, model: ir.Model) -> int:
        """The number of rewrites that this model needs; a silent no-op is the main risk of a compiler.

        It follows from the masks and the config, not from what `rewrite` looks for: what was renamed or spelled in
        another way is missed by both otherwise.
        """

    @abstractmethod
    def rewrite(self, model: ir.Model) -> int:
        """Change the model in place; return the number of rewrites made. Unused weights need not be removed here."""

    def leave(self, what: str | None, reason: str) -> None:
        """Note why a candidate is not rewritten, with the value that decides.

        `--dump-ir` writes the notes down, `--debug` prints them.
        """
        self.left.append(f"{what}: {reason}")

    def call(self, model: ir.Model) -> PassResult:
        self.left.clear()
        expected = self.expected(model)
        self.count = self.rewrite(model)
        drop_unused_initializers(model.graph)
        if self.count != expected:
            raise CompileError(f"pass {self.name} made {self.count} rewrites where {expected} were expected")
        return PassResult(model, modified=self.count > 0)


class BlockPass(RewritePass):
    """A pass over the blocks of a model: its config and its masks say what must be there."""

    def __init__(self, config: DecoderConfig, masks: Masks) -> None:
        super().__init__()
        self.config = config
        self.masks = masks
