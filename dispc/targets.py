"""The targets: one row for each kind of artifact, with what exists there and what pays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dispc.lowerings import CPU, CUDA

FUSIONS = (
    "fill-zeros",
    "fuse-rotary",
    "fuse-qkv",
    "fuse-gate-up",
    "fuse-activations",
    "fuse-skip-norm",
    "tie-embeddings",
)
"""The passes that a compilation can do without: they change how fast the artifact is, not what it computes."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One row of the table. The first dtype is the default.

    `group_query` lists the dtypes for which ONNX Runtime has a GroupQueryAttention kernel on this provider (opset 23's
    Attention serves the others). `lowering` names the default (a row of `LOWERINGS`), which must run in every dtype.
    `contrib` says whether operators outside ONNX's own domain may be used, `fusions` which passes pay,
    `quantised_fusions` which others do with quantised weights. Written widths are padded to `write_multiple`, read and
    mid widths to `half_align` in half precision and to `int4_align` where weights have four bits, by
    default. `cuda_graph` says whether a run can be captured, `rotates_apart` whether ONNX Runtime leaves a
    com.microsoft.RotaryEmbedding before GroupQueryAttention as it is, `int8_activations` whether it can round what
    integer weights are multiplied with to int8. Artifacts of a dtype in `elsewhere` run on the provider named there.
    """

    name: str
    provider: str
    dtypes: tuple[str, ...]
    group_query: tuple[str, ...]
    lowering: str
    contrib: bool
    fusions: tuple[str, ...]
    write_multiple: int
    quantised_fusions: tuple[str, ...] = ()
    cuda_graph: bool = False
    rotates_apart: bool = True
    int8_activations: bool = False
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    half_align: int = 1
    int4_align: int = 1

    def provider_of(self, dtype: str) -> str:
        """The provider that has the kernels for an artifact of `dtype`."""
        return self.elsewhere.get(dtype, self.provider)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="onnx-cuda",
            provider=CUDA,
            dtypes=("float16", "bfloat16", "float32"),
            group_query=("float16", "bfloat16"),
            lowering="inverse-gather",
            contrib=True,
            fusions=FUSIONS,
            write_multiple=8,
            cuda_graph=True,
            rotates_apart=False,
            half_align=8,  # cuBLAS reads 16 bytes at a time where rows begin on them ...
            int4_align=32,  # ... and MatMulNBits' fast kernels take whole blocks of 32 weights only
        ),
        Target(
            name="onnx-cpu",
            provider=CPU,
            dtypes=("float32",),
            group_query=("float32",),
            lowering="feature-extractor",
            contrib=True,
            fusions=tuple(name for name in FUSIONS if name != "fuse-gate-up"),  # its Split costs more than it saves ...
            quantised_fusions=("fuse-gate-up",),  # ... but for integers, where each MatMulNBits has a fixed cost
            write_multiple=1,
            int8_activations=True,
        ),
        Target(
            name="onnx",
            provider=CPU,
            dtypes=("float32", "float16", "bfloat16"),
            group_query=(),
            lowering="inverse-gather",
            contrib=False,
            fusions=("fill-zeros", "tie-embeddings"),
            write_multiple=1,
            elsewhere={"bfloat16": CUDA},  # the CPU multiplies no bfloat16 matrices
        ),
    )
}


def names_of(wanted: Callable[[Target], bool]) -> str:
    """The targets that are `wanted`, as messages name them: `onnx-cpu or onnx-cuda`."""
    return " or ".join(sorted(target.name for target in TARGETS.values() if wanted(target)))
