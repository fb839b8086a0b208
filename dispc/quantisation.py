"""What is quantised and how finely: the options of weight-only quantisation, checked once. Knows nothing of graphs."""

from dataclasses import asdict, dataclass
from typing import Any

from dispc.errors import CompileError

BITS = {"int4": 4, "int8": 8}
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Those that every kernel behind MatMulNBits and GatherBlockQuantized takes."""


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """Weights become integers of `bits` bits; along its inputs, each `block_size` weights of an output share a scale.

    Symmetric integers stand for multiples of the scale around zero; asymmetric blocks have a zero point each. All
    projections of the blocks are quantised; the LM head and the token embedding only where asked.
    """

    bits: int
    block_size: int
    symmetric: bool
    head: bool
    embedding: bool

    def as_dict(self) -> dict[str, Any]:
        """As dispc.json holds it; `Quantisation(**...)` reads it."""
        return asdict(self)

    def __str__(self) -> str:
        parts = ["blocks", *(["LM head"] if self.head else []), *(["embedding"] if self.embedding else [])]
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"int{self.bits}, {kind}, block size {self.block_size}: {', '.join(parts)}"


def make_quantisation(
    name: str | None, *, block_size: int | None, asymmetric: bool, head: bool, embedding: bool
) -> Quantisation | None:
    """The options of the command line as a Quantisation; None without `name`.

    Raises:
        CompileError: for an unknown name, a block size without kernels, or options that have nothing to act on.
    """
    if name is None:
        if block_size is not None or asymmetric or head or embedding:
            raise CompileError("options of quantisation are given without --quantize; add --quantize int4 or int8")
        return None
    if name not in BITS:
        raise CompileError(f"unknown quantisation {name!r}; quantisations are {', '.join(BITS)}")
    size = 32 if block_size is None else block_size
    if size not in BLOCK_SIZES:
        raise CompileError(f"block size {size} has no kernels; block sizes are {', '.join(map(str, BLOCK_SIZES))}")
    return Quantisation(
        bits=BITS[name], block_size=size, symmetric=not asymmetric, head=head, embedding=embedding
    )  # fmt: skip
