"""The algorithms that round weights to 4 bits: one row each. Their code is in `dispc.passes.rounding`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One way to round weights to 4 bits.

    Args:
        name: What `--algorithm` calls it.
        label: How it rounds, for the help of `--algorithm`.
        asymmetric: Its blocks have zero points, asked for or not.
        reads_text: It looks at the inputs of each product, which a text gives.
        repeatable: The reference rounds by its rule (`dispc.reference.quantised`), instead of reading the integers.
    """

    name: str
    label: str
    asymmetric: bool = False
    reads_text: bool = False
    repeatable: bool = False


NEAREST = "rtn"
"""The algorithm that is used where no other is asked for, or can be."""
STRAYED = 0.4
"""Largest error of weights over their norm, in a block, or in a row where rounding reads a text. Rounding to 4 bits
makes 0.1, GPTQ about 0.15; other weights 1.4."""
LEAN, ROW_CHANCE = 0.01, 12.0
"""What is stored of a row of K weights w is t w + e, where t is the factor that leaves the least e. Rounding leaves
|t - 1| <= LEAN + ROW_CHANCE r / sqrt(K) with r = |e| / |w|, and r squared more below 1. Of a real model GPTQ needed a
ROW_CHANCE of 11."""
SMALL, TINY = 0.1, 1e-3
"""Norms of blocks count as at least so much of the root mean square of their row's, and so much of the largest of all:
what is smaller adds nothing, and may be rounded to nothing."""
ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm(name=NEAREST, label="to the nearest integer", repeatable=True),
        Algorithm(name="k_quant", label="scale and minimum that lose least, as in llama.cpp", asymmetric=True),
        Algorithm(name="hqq", label="half-quadratic, without data", asymmetric=True),
        Algorithm(name="gptq", label="by the inputs of each product, from the text of --data", reads_text=True),
    )
}
