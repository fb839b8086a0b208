"""The targets: what an artifact is for decides its dtype, its attention operator and how writes are spelled."""

from dataclasses import dataclass, replace
from typing import Literal

from dispc.errors import CompileError
from dispc.quantisation import Quantisation

Lowering = Literal["inverse-gather", "canonical"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One row of the table. The first dtype is the default.

    `group_query` lists the dtypes for which ONNX Runtime has a GroupQueryAttention kernel on this provider (opset 23's
    Attention serves the others), `scatter_add` those for which it can run ScatterND(add). `contrib` says whether
    ONNX Runtime's own operators may be used, or only standard ones.
    """

    name: str
    provider: str
    dtypes: tuple[str, ...]
    group_query: tuple[str, ...]
    scatter_add: tuple[str, ...]
    contrib: bool = True


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="onnx-cuda",
            provider="CUDAExecutionProvider",
            dtypes=("float16", "bfloat16", "float32"),
            group_query=("float16", "bfloat16"),
            scatter_add=("float16", "float32"),
        ),
        Target(
            name="onnx-cpu",
            provider="CPUExecutionProvider",
            dtypes=("float32",),
            group_query=("float32",),
            scatter_add=("float32",),
        ),
        Target(
            name="onnx",
            provider="CPUExecutionProvider",
            dtypes=("float32", "float16", "bfloat16"),
            group_query=(),
            scatter_add=("float32",),
            contrib=False,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A target with every choice made."""

    target: Target
    dtype: str
    padding: Literal["left", "right"]
    lowering: Lowering
    reason: str
    quantisation: Quantisation | None = None

    @property
    def exact(self) -> "Plan":
        """This plan without int8 activations, whose rounding no reference can follow exactly."""
        if self.quantisation is None:
            return self
        return replace(self, quantisation=replace(self.quantisation, int8_activations=False))

    @property
    def group_query(self) -> bool:
        """Attention is com.microsoft.GroupQueryAttention, not the opset 23 Attention."""
        return self.dtype in self.target.group_query


def make_plan(
    target: str,
    dtype: str | None = None,
    padding: str | None = None,
    lowering: str | None = None,
    quantisation: Quantisation | None = None,
) -> Plan:
    """Fill in the defaults of a target and refuse what ONNX Runtime cannot run.

    Raises:
        CompileError: for an unknown name, or a combination without a kernel, with the alternative named.
    """
    if target not in TARGETS:
        raise CompileError(f"unknown target {target!r}; targets are {', '.join(TARGETS)}")
    row = TARGETS[target]
    dtype = dtype or row.dtypes[0]
    if dtype not in row.dtypes:
        raise CompileError(f"target {target} has no dtype {dtype!r}; it has {', '.join(row.dtypes)}")
    if quantisation and not row.contrib:
        raise CompileError(
            f"target {target} has standard operators only, and quantised weights need MatMulNBits; "
            "use --target onnx-cpu or onnx-cuda"
        )
    group_query = dtype in row.group_query
    if padding not in (None, "left", "right"):
        raise CompileError(f"unknown padding {padding!r}; it is left or right")
    if padding == "right" and not group_query:
        raise CompileError(
            f"target {target} in {dtype} masks by attention_mask and takes padding on the left; use --padding left"
        )
    side: Literal["left", "right"] = "right" if group_query and padding != "left" else "left"
    if lowering == "canonical":
        if dtype not in row.scatter_add:
            raise CompileError(
                f"ONNX Runtime cannot run ScatterND(add) in {dtype} for target {target}; use --lowering inverse-gather"
            )
        reason = "chosen by --lowering"
        return Plan(
            target=row, dtype=dtype, padding=side, lowering="canonical", reason=reason, quantisation=quantisation
        )
    if lowering not in (None, "inverse-gather"):
        raise CompileError(f"unknown lowering {lowering!r}; lowerings are canonical, inverse-gather")
    reason = "chosen by --lowering" if lowering else "default: runs in every dtype, without atomics"
    return Plan(
        target=row, dtype=dtype, padding=side, lowering="inverse-gather", reason=reason, quantisation=quantisation
    )
