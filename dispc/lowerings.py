"""The lowerings: how an artifact reads parts of the residual stream and adds into parts of it. One row each."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dispc.support.dtypes import ARTIFACT_DTYPES

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
"""What ONNX Runtime calls its execution providers."""


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """One row of the table.

    Args:
        name: What `--lowering` calls it.
        label: How it reads and writes, for the help of `--lowering`.
        reads_by: The operator that reads a part of the stream.
        writes_by: The operator that adds into it: a scatter, or the Add after a read by the inverse index.
        domain: The domain of `reads_by`; the empty one is what every build of ONNX Runtime has.
        dtypes: The dtypes in which providers run both operators ...
        exceptions: ... and those of the providers that are known to run others.
        passes: The passes that make it of the canonical form, in order: modules of `dispc.passes.lower`.
        fills: Whether sets that are not worth an index list become zeros in the weights.
        unfilled: The lowering that it is where no set becomes zeros; empty where it is another one even then.
        quantised: Whether the weights may be integers.
    """

    name: str
    label: str
    reads_by: str = "Gather"
    writes_by: str = "Add"
    domain: str = ""
    dtypes: tuple[str, ...]
    exceptions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    passes: tuple[str, ...]
    fills: bool = False
    unfilled: str = ""
    quantised: bool = True

    @property
    def adds(self) -> bool:
        """Whether every write ends in an Add, which can be fused with the next norm."""
        return self.writes_by == "Add"

    @property
    def operator(self) -> str:
        """The operator that decides where it runs."""
        return self.reads_by if self.adds else f"{self.writes_by}(add)"

    def runs(self, provider: str, dtype: str) -> bool:
        """Whether ONNX Runtime has the kernels."""
        return dtype in self.exceptions.get(provider, self.dtypes)


LOWERINGS: dict[str, Lowering] = {
    row.name: row
    for row in (
        Lowering(
            name="inverse-gather",
            label="Gather",
            dtypes=ARTIFACT_DTYPES,
            passes=("inverse-gather",),
        ),
        Lowering(
            name="canonical",
            label="writes by ScatterND",
            writes_by="ScatterND",
            dtypes=("float32",),
            exceptions={CUDA: ("float32", "float16")},
            passes=(),
        ),
        Lowering(
            name="scatter-elements",
            label="writes by ScatterElements",
            writes_by="ScatterElements",
            dtypes=("float32",),
            exceptions={CUDA: ("float32", "float16")},
            passes=("scatter-elements",),
        ),
        Lowering(
            name="zero-filled",
            label="Gather; zeros in the weights for sets not worth an index list",
            dtypes=ARTIFACT_DTYPES,
            passes=("inverse-gather",),
            fills=True,
            unfilled="inverse-gather",
            quantised=False,
        ),
        Lowering(
            name="feature-extractor",
            label="ArrayFeatureExtractor, with such zeros",
            reads_by="ArrayFeatureExtractor",
            domain="ai.onnx.ml",
            dtypes=(),
            exceptions={CPU: ("float32",)},
            passes=("inverse-gather", "feature-extractor"),
            fills=True,
        ),
    )
}
READS = frozenset(row.reads_by for row in LOWERINGS.values())
WRITES = frozenset(row.writes_by for row in LOWERINGS.values())
"""The operators by which artifacts read a part of the stream, and add to it."""
