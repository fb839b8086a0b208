"""What is quantised and how finely: the options of weight-only quantisation, checked once. Knows nothing of graphs."""

from dataclasses import asdict, dataclass
from typing import Any

from dispc.support.errors import CompileError

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
