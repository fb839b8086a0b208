"""What is quantised, how finely and by which algorithm: the options, checked once. Knows nothing of graphs."""

from dataclasses import dataclass, replace
from typing import Any

from dispc.algorithms import ALGORITHMS, NEAREST, Algorithm
from dispc.model.family import Family
from dispc.support.errors import CompileError
from dispc.support.rows import find_row
from dispc.support.typed_json import to_json
from dispc.targets import TARGETS, names_of

BITS = {"int4": 4, "int8": 8}
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""What MatMulNBits and GatherBlockQuantized take (256 without the CUDA kernels for single tokens)."""
MIXED = ("widths", "damage")
"""How `--mixed` chooses the products that keep 8 bits: by a rule, or by the loss that each adds on a text."""


HEAD_PRODUCT = "head"


def product_of(weight: str, family: Family) -> str:
    """What the product with a weight is called: by the set that it reads or writes, `3.mlp.read`; or `head`.

    The projections that read the same set are one product, whether they are packed or not.
    """
    number, _, module = weight.removeprefix(f"{family.layers}.").removesuffix(".weight").partition(".")
    if not number.isdecimal():
        return HEAD_PRODUCT
    if module in (family.attention_out, family.down):
        return f"{number}.{'attention' if module == family.attention_out else 'mlp'}.write"
    mlp = module in family.mlp_reads or module.endswith("gate_up_proj")
    return f"{number}.{'mlp' if mlp else 'attention'}.read"


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """Weights become integers of `bits` bits; along its inputs, each `block_size` weights of an output share a scale.

    Symmetric integers stand for multiples of the scale around zero; asymmetric blocks have a zero point each. All
    projections of the blocks are quantised; the LM head and the token embedding only where asked. `algorithm` is one of
    ALGORITHMS. With `mixed`, one of MIXED, the products in `int8` (called by the sets that they read or write, such as
    `3.mlp.write`) have 8 bits, symmetric and rounded to the nearest.

    `int8_activations` lets the CPU's kernels round what a weight is multiplied with to int8 too, block by block
    (`accuracy_level` 4 of MatMulNBits): the fastest kernels, and for int8 weights the only ones.
    """

    bits: int
    block_size: int
    symmetric: bool
    head: bool
    embedding: bool
    int8_activations: bool = False
    algorithm: str = NEAREST
    mixed: str | None = None
    int8: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "int8", tuple(self.int8))  # a list would make it unequal, and not hashable

    @property
    def rounding(self) -> Algorithm:
        """The row of its algorithm.

        Raises:
            CompileError: when there is none of that name.
        """
        return find_row(ALGORITHMS, self.algorithm, "algorithm")

    @property
    def without_text(self) -> "Quantisation":
        """How a weight is rounded whose inputs are not known: to the nearest, if the algorithm looks at them."""
        return replace(self, algorithm=NEAREST) if self.rounding.reads_text else self

    @property
    def wide(self) -> "Quantisation":
        """What the products in `int8` are rounded by."""
        return replace(self, bits=8, symmetric=True, algorithm=NEAREST)

    @property
    def wants_text(self) -> bool:
        """It cannot be done without a text."""
        return self.rounding.reads_text or self.mixed == "damage"

    def of(self, product: str) -> "Quantisation":
        """What the product called so is rounded by."""
        return self.wide if product in self.int8 else self

    def as_dict(self) -> dict[str, Any]:
        """As dispc.json holds it."""
        content: dict[str, Any] = to_json(self)
        return content

    def __str__(self) -> str:
        parts = ["blocks", *(["LM head"] if self.head else []), *(["embedding"] if self.embedding else [])]
        kind = "symmetric" if self.symmetric else "asymmetric"
        activations = ", int8 activations" if self.int8_activations else ""
        algorithm = "" if self.algorithm == NEAREST else f", {self.algorithm}"
        mixed = f", {len(self.int8)} products in int8 by {self.mixed}" if self.mixed else ""
        return (
            f"int{self.bits}, {kind}, block size {self.block_size}{algorithm}{activations}{mixed}: {', '.join(parts)}"
        )


def make_quantisation(
    name: str | None,
    target: str,
    *,
    block_size: int | None,
    asymmetric: bool,
    head: bool,
    embedding: bool,
    int8_activations: bool | None,
    algorithm: str | None = None,
    mixed: str | None = None,
) -> Quantisation | None:
    """The options of the command line as a Quantisation; None without `name`.

    `int8_activations` None means yes where there are int8 weights on the CPU, which otherwise run far slower than
    float32: ONNX Runtime 1.31 has no floating-point kernel for them there, and spells the whole weight out again at
    every token.

    Raises:
        CompileError: for an unknown name, a choice without kernels, or options that have nothing to act on.
    """
    if name is None:
        if any((block_size is not None, asymmetric, head, embedding, int8_activations is not None, algorithm, mixed)):
            raise CompileError("options of quantisation are given without --quantize; add --quantize int4 or int8")
        return None
    bits = find_row(BITS, name, "quantisation")
    size = 32 if block_size is None else block_size
    if size not in BLOCK_SIZES:
        raise CompileError(f"block size {size} has no kernels; block sizes are {', '.join(map(str, BLOCK_SIZES))}")
    has_int8 = target in TARGETS and TARGETS[target].int8_activations
    if int8_activations and not has_int8:
        raise CompileError(
            f"target {target} has no kernels for int8 activations; they are for --target "
            f"{names_of(lambda other: other.int8_activations)}"
        )
    for option, value, known in (("algorithm", algorithm, ALGORITHMS), ("mixed", mixed, MIXED)):
        if value is not None and value not in known:
            raise CompileError(f"--{option} {value!r} is not known; it is one of {', '.join(known)}")
        if value not in (None, NEAREST) and name != "int4":
            raise CompileError(f"--{option} {value} is for --quantize int4: int8 loses next to nothing as it is")
    if int8_activations is None:
        int8_activations = (name == "int8" or mixed is not None) and has_int8
    return Quantisation(
        bits=bits,
        block_size=size,
        symmetric=not asymmetric and not ALGORITHMS[algorithm or NEAREST].asymmetric,
        head=head,
        embedding=embedding,
        int8_activations=int8_activations,
        algorithm=algorithm or NEAREST,
        mixed=mixed,
    )
