"""The lowerings: how an artifact reads parts of the residual stream and adds into parts of it. One row each."""

from collections.abc import Mapping
from dataclasses import dataclass

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
EVERY = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """One row of the table.

    Args:
        name: What `--lowering` calls it.
        label: How it reads and writes, for the help of `--lowering`.
        operator: The operator it stands on, beside Gather and Add.
        domain: That operator's domain; the empty one is what every build of ONNX Runtime has.
        kernels: The dtypes in which ONNX Runtime runs `operator`, by provider.
        passes: The passes that make it of the canonical form, in order: modules of `dispc.passes.lower`.
        fills: Whether sets that are not worth an index list become zeros in the weights.
        quantised: Whether the weights may be integers.
    """

    name: str
    label: str
    operator: str
    domain: str = ""
    kernels: Mapping[str, tuple[str, ...]]
    passes: tuple[str, ...]
    fills: bool = False
    quantised: bool = True

    @property
    def adds(self) -> bool:
        """Whether every write ends in an Add, which can be fused with the next norm."""
        return "inverse-gather" in self.passes

    @property
    def scatter(self) -> str:
        """The operator type that adds into a part of the stream; empty for lowerings that gather and add."""
        return self.operator.removesuffix("(add)") if self.operator.endswith("(add)") else ""

    def runs(self, provider: str, dtype: str) -> bool:
        """Whether ONNX Runtime has the kernels."""
        return dtype in self.kernels.get(provider, ())


LOWERINGS: dict[str, Lowering] = {
    row.name: row
    for row in (
        Lowering(
            name="inverse-gather",
            label="Gather",
            operator="Gather",
            kernels={CPU: EVERY, CUDA: EVERY},
            passes=("inverse-gather",),
        ),
        Lowering(
            name="canonical",
            label="writes by ScatterND",
            operator="ScatterND(add)",
            kernels={CPU: ("float32",), CUDA: ("float32", "float16")},
            passes=(),
        ),
        Lowering(
            name="scatter-elements",
            label="writes by ScatterElements",
            operator="ScatterElements(add)",
            kernels={CPU: ("float32",), CUDA: ("float32", "float16")},
            passes=("scatter-elements",),
        ),
        Lowering(
            name="zero-filled",
            label="Gather; zeros in the weights for sets not worth an index list",
            operator="Gather",
            kernels={CPU: EVERY, CUDA: EVERY},
            passes=("inverse-gather",),
            fills=True,
            quantised=False,
        ),
        Lowering(
            name="feature-extractor",
            label="ArrayFeatureExtractor, with such zeros",
            operator="ArrayFeatureExtractor",
            domain="ai.onnx.ml",
            kernels={CPU: ("float32",)},
            passes=("inverse-gather", "feature-extractor"),
            fills=True,
        ),
    )
}
