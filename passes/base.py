"""What every rewriting pass of dispc has in common: it knows how often it must apply, and fails when it did not."""

from abc import abstractmethod

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from dispc.support.errors import CompileError


class ConditionError(CompileError, PreconditionError, PostconditionError):
    """What `requires` and `ensures` raise: onnx_ir passes its own condition errors on and wraps all others."""


class RewritePass(InPlacePass):
    """A pass that counts its rewrites. Subclasses set `name`, and implement `expected` and `rewrite`."""

    name: str

    @abstractmethod
    def expected(self, model: ir.Model) -> int:
        """The number of rewrites that this model needs; a silent no-op is the main risk of a compiler."""

    @abstractmethod
    def rewrite(self, model: ir.Model) -> int:
        """Change the model in place; return the number of rewrites made."""

    def call(self, model: ir.Model) -> PassResult:
        expected = self.expected(model)
        self.count = self.rewrite(model)
        if self.count != expected:
            raise CompileError(f"pass {self.name} made {self.count} rewrites where {expected} were expected")
        return PassResult(model, modified=self.count > 0)
