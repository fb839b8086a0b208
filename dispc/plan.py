"""The targets, and what may be chosen for each: dtype, padding, lowering, quantisation. A `Plan` has it all settled.

Knows nothing of graphs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from dispc.support.errors import CompileError

Lowering = Literal["inverse-gather", "canonical", "scatter-elements", "zero-filled"]
Padding = Literal["left", "right"]
FUSIONS = ("fuse-rotary", "fuse-qkv", "fuse-gate-up", "fuse-activations", "fuse-skip-norm", "tie-embeddings")
"""The passes that a compilation can do without: they change how fast the artifact is, not what it computes."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One row of the table. The first dtype is the default.

    `group_query` lists the dtypes for which ONNX Runtime has a GroupQueryAttention kernel on this provider (opset 23's
    Attention serves the others), `scatter_add` those for which it can run ScatterND(add) and ScatterElements(add).
    `lowering` is the default, which must run in every dtype. `contrib` says whether operators of com.microsoft may be
    used, `fusions` which passes pay, `quantised_fusions` which others do with quantised weights. Written widths are
    padded to `write_multiple`, read and mid widths to `half_align` in half precision and to `int4_align` where weights
    have four bits, unless told otherwise. `cuda_graph` says whether a run can be captured.
    """

    name: str
    provider: str
    dtypes: tuple[str, ...]
    group_query: tuple[str, ...]
    scatter_add: tuple[str, ...]
    lowering: Lowering
    contrib: bool
    fusions: tuple[str, ...]
    write_multiple: int
    quantised_fusions: tuple[str, ...] = ()
    cuda_graph: bool = False
    half_align: int = 1
    int4_align: int = 1


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="onnx-cuda",
            provider="CUDAExecutionProvider",
            dtypes=("float16", "bfloat16", "float32"),
            group_query=("float16", "bfloat16"),
            scatter_add=("float16", "float32"),
            lowering="inverse-gather",
            contrib=True,
            fusions=FUSIONS,
            write_multiple=8,
            cuda_graph=True,
            half_align=8,  # cuBLAS reads 16 bytes at a time where rows begin on them ...
            int4_align=32,  # ... and MatMulNBits' fast kernels take whole blocks of 32 weights only
        ),
        Target(
            name="onnx-cpu",
            provider="CPUExecutionProvider",
            dtypes=("float32",),
            group_query=("float32",),
            scatter_add=("float32",),
            lowering="canonical",  # as fast as the others for a token, faster for a prompt and behind a long past
            contrib=True,
            fusions=tuple(name for name in FUSIONS if name != "fuse-gate-up"),  # its Split costs more than it saves ...
            quantised_fusions=("fuse-gate-up",),  # ... but for integers, whose MatMulNBits has a price by itself
            write_multiple=1,
        ),
        Target(
            name="onnx",
            provider="CPUExecutionProvider",
            dtypes=("float32", "float16", "bfloat16"),
            group_query=(),
            scatter_add=("float32",),
            lowering="inverse-gather",
            contrib=False,
            fusions=("tie-embeddings",),
            write_multiple=1,
        ),
    )
}


BITS = {"int4": 4, "int8": 8}
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""What MatMulNBits and GatherBlockQuantized take (256 without the CUDA kernels for single tokens)."""


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """Weights become integers of `bits` bits; along its inputs, each `block_size` weights of an output share a scale.

    Symmetric integers stand for multiples of the scale around zero; asymmetric blocks have a zero point each. All
    projections of the blocks are quantised; the LM head and the token embedding only where asked.

    `int8_activations` lets the CPU's kernels round what a weight is multiplied with to int8 too, block by block
    (`accuracy_level` 4 of MatMulNBits): the fastest kernels, and for int8 weights the only ones.
    """

    bits: int
    block_size: int
    symmetric: bool
    head: bool
    embedding: bool
    int8_activations: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As dispc.json holds it; `Quantisation(**...)` reads it."""
        return asdict(self)

    def __str__(self) -> str:
        parts = ["blocks", *(["LM head"] if self.head else []), *(["embedding"] if self.embedding else [])]
        kind = "symmetric" if self.symmetric else "asymmetric"
        activations = ", int8 activations" if self.int8_activations else ""
        return f"int{self.bits}, {kind}, block size {self.block_size}{activations}: {', '.join(parts)}"


def make_quantisation(
    name: str | None,
    target: str,
    *,
    block_size: int | None,
    asymmetric: bool,
    head: bool,
    embedding: bool,
    int8_activations: bool | None,
) -> Quantisation | None:
    """The options of the command line as a Quantisation; None without `name`.

    `int8_activations` None means yes for int8 weights on the CPU, which otherwise run far slower than float32: ONNX
    Runtime 1.31 has no floating-point kernel for them there, and spells the whole weight out again at every token.

    Raises:
        CompileError: for an unknown name, a choice without kernels, or options that have nothing to act on.
    """
    if name is None:
        if block_size is not None or asymmetric or head or embedding or int8_activations is not None:
            raise CompileError("options of quantisation are given without --quantize; add --quantize int4 or int8")
        return None
    if name not in BITS:
        raise CompileError(f"unknown quantisation {name!r}; quantisations are {', '.join(BITS)}")
    size = 32 if block_size is None else block_size
    if size not in BLOCK_SIZES:
        raise CompileError(f"block size {size} has no kernels; block sizes are {', '.join(map(str, BLOCK_SIZES))}")
    if int8_activations and target != "onnx-cpu":
        raise CompileError(f"target {target} has no kernels for int8 activations; they are for --target onnx-cpu")
    if int8_activations is None:
        int8_activations = name == "int8" and target == "onnx-cpu"
    return Quantisation(
        bits=BITS[name], block_size=size, symmetric=not asymmetric, head=head, embedding=embedding,
        int8_activations=int8_activations,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a user may choose for a target; None leaves it to the target's defaults.

    `align` pads read and mid widths with zeros to a multiple, `without` names fusions to leave out.
    """

    dtype: str | None = None
    padding: str | None = None
    lowering: str | None = None
    align: int | None = None
    last_logits: bool = False
    cuda_graph: bool = True
    without: tuple[str, ...] = ()
    quantisation: Quantisation | None = None


def choices_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The target and the `Choices` that an artifact was compiled with, from its dispc.json, as keyword arguments."""
    fusions = manifest.get("fusions", TARGETS[manifest["target"]].fusions)
    return {
        "target": manifest["target"], "dtype": manifest["dtype"], "padding": manifest["padding"],
        "lowering": manifest["lowering"]["name"], "align": manifest.get("align", 1),
        "last_logits": manifest.get("logits") == "last", "cuda_graph": manifest.get("cuda_graph", False),
        "without": tuple(name for name in FUSIONS if name not in fusions),
        "quantisation": Quantisation(**manifest["quantisation"]) if manifest.get("quantisation") else None,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A target with every choice made; `reason` says why the lowering is what it is."""

    target: Target
    dtype: str
    padding: Padding
    lowering: Lowering
    reason: str
    align: int
    last_logits: bool
    cuda_graph: bool
    fusions: tuple[str, ...]
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


def make_plan(target: str, choices: Choices = Choices()) -> Plan:
    """Fill in the defaults of a target and refuse what ONNX Runtime cannot run.

    Raises:
        CompileError: for an unknown name, or a combination without a kernel, with the alternative named.
    """
    if target not in TARGETS:
        raise CompileError(f"unknown target {target!r}; targets are {', '.join(TARGETS)}")
    row = TARGETS[target]
    dtype = choices.dtype or row.dtypes[0]
    if dtype not in row.dtypes:
        raise CompileError(f"target {target} has no dtype {dtype!r}; it has {', '.join(row.dtypes)}")
    if choices.align is not None and choices.align < 1:
        raise CompileError(f"widths cannot be aligned to {choices.align}; choose 8, 16 or 64")
    if unknown := set(choices.without) - set(FUSIONS):
        raise CompileError(f"unknown pass {min(unknown)!r}; those that can be left out are {', '.join(FUSIONS)}")
    if choices.quantisation and not row.contrib:
        raise CompileError(
            f"target {target} has standard operators only, and quantised weights need MatMulNBits; "
            "use --target onnx-cpu or onnx-cuda"
        )
    padding = _padding(row, dtype, choices.padding)
    lowering, reason = _lowering(row, dtype, choices.lowering)
    fusions = row.fusions + (row.quantised_fusions if choices.quantisation else ())
    if choices.quantisation and lowering == "zero-filled":
        raise CompileError("--quantize rounds what is kept, not zeros between it; use --lowering inverse-gather")
    return Plan(
        target=row,
        dtype=dtype,
        padding=padding,
        lowering=lowering,
        reason=reason,
        align=choices.align or _align(row, dtype, choices.quantisation),
        last_logits=choices.last_logits,
        cuda_graph=choices.cuda_graph and row.cuda_graph and dtype in row.group_query and padding == "right",
        fusions=tuple(name for name in fusions if name not in choices.without),
        quantisation=choices.quantisation,
    )


def _padding(row: Target, dtype: str, padding: str | None) -> Padding:
    group_query = dtype in row.group_query
    if padding not in (None, "left", "right"):
        raise CompileError(f"unknown padding {padding!r}; it is left or right")
    if padding == "right" and not group_query:
        raise CompileError(
            f"target {row.name} in {dtype} masks by attention_mask and takes padding on the left; use --padding left"
        )
    return "right" if group_query and padding != "left" else "left"


def _align(row: Target, dtype: str, quantisation: Quantisation | None) -> int:
    if quantisation and quantisation.bits == 4:
        return row.int4_align
    return 1 if dtype == "float32" else row.half_align


def _lowering(row: Target, dtype: str, lowering: str | None) -> tuple[Lowering, str]:
    if lowering is None:
        return row.lowering, f"the default of {row.name}"
    for known in get_args(Lowering):
        if lowering != known:
            continue
        if lowering in ("canonical", "scatter-elements") and dtype not in row.scatter_add:
            operator = "ScatterND" if lowering == "canonical" else "ScatterElements"
            raise CompileError(
                f"ONNX Runtime cannot run {operator}(add) in {dtype} for target {row.name}; "
                "use --lowering inverse-gather"
            )
        return known, "chosen by --lowering"
    raise CompileError(f"unknown lowering {lowering!r}; lowerings are {', '.join(get_args(Lowering))}")
