"""What may be chosen for a target: dtype, padding, lowering, quantisation. A `Plan` has it all settled.

Knows nothing of graphs.
"""

from dataclasses import dataclass, replace
from typing import Literal

from dispc.lowerings import LOWERINGS, Lowering
from dispc.manifest import Manifest
from dispc.masks import Masks
from dispc.model.config import DecoderConfig
from dispc.quantisation import Quantisation
from dispc.selection import DEFAULT_COSTS, SelectionCosts, sets_to_fill
from dispc.support.errors import CompileError
from dispc.support.inputs import LARGEST
from dispc.support.rows import find_row
from dispc.targets import FUSIONS, TARGETS, Target, names_of

Padding = Literal["left", "right"]


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


def choices_of(manifest: Manifest) -> Choices:
    """What an artifact was compiled with, beside its target.

    Raises:
        CompileError: when the artifact is of an unknown target.
    """
    fusions = find_row(TARGETS, manifest.target, "target").fusions if manifest.fusions is None else manifest.fusions
    return Choices(
        dtype=manifest.dtype,
        padding=manifest.padding,
        lowering=manifest.lowering.name,
        align=manifest.align,
        last_logits=manifest.logits == "last",
        cuda_graph=manifest.cuda_graph,
        without=tuple(name for name in FUSIONS if name not in fusions),
        quantisation=manifest.quantisation,
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A target with every choice made; `reason` says why the lowering is what it is, `costs` which sets it fills."""

    target: Target
    dtype: str
    padding: Padding
    lowering: Lowering
    reason: str
    costs: SelectionCosts
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
    def fills(self) -> bool:
        """Sets not worth an index list become zeros; never if quantised: blocks hold kept weights only."""
        return self.lowering.fills and "fill-zeros" in self.fusions and self.quantisation is None

    def filled(self, masks: Masks, config: DecoderConfig) -> tuple[str, ...] | None:
        """Those sets, such as `0.mlp.read`, in order of their blocks; None where the plan fills none."""
        if not self.fills:
            return None
        return tuple(f"{block}.{name}" for block, name in sorted(sets_to_fill(masks, config, self.costs)))

    @property
    def rounds_by_inputs(self) -> bool:
        """The weights are rounded by what they are multiplied with."""
        return self.quantisation is not None and self.quantisation.rounding.reads_text

    @property
    def group_query(self) -> bool:
        """Attention is com.microsoft.GroupQueryAttention, not the opset 23 Attention."""
        return self.dtype in self.target.group_query


def make_plan(target: str, choices: Choices = Choices()) -> Plan:
    """Fill in the defaults of a target and refuse what ONNX Runtime cannot run.

    Raises:
        CompileError: for an unknown name, or a combination without a kernel, with the alternative named.
    """
    row = find_row(TARGETS, target, "target")
    dtype = choices.dtype or row.dtypes[0]
    if dtype not in row.dtypes:
        raise CompileError(f"target {target} has no dtype {dtype!r}; it has {', '.join(row.dtypes)}")
    if choices.align is not None and not 1 <= choices.align <= LARGEST:
        raise CompileError(f"widths cannot be aligned to {choices.align}; choose 8, 16 or 64")
    if unknown := set(choices.without) - set(FUSIONS):
        raise CompileError(f"unknown pass {min(unknown)!r}; those that can be left out are {', '.join(FUSIONS)}")
    if choices.quantisation and not row.contrib:
        raise CompileError(
            f"target {target} has standard operators only, and quantised weights need MatMulNBits; "
            f"use --target {names_of(lambda other: other.contrib)}"
        )
    padding = _padding(row, dtype, choices.padding)
    lowering, reason = _lowering(row, dtype, choices.lowering)
    fusions = row.fusions + (row.quantised_fusions if choices.quantisation else ())
    if choices.quantisation and not lowering.quantised:
        raise CompileError(
            f"--quantize does not go with --lowering {lowering.name}, whose zeros would be quantised too; "
            f"use --lowering {row.lowering}"
        )
    return Plan(
        target=row,
        dtype=dtype,
        padding=padding,
        lowering=lowering,
        reason=reason,
        costs=DEFAULT_COSTS,
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


def _lowering(row: Target, dtype: str, name: str | None) -> tuple[Lowering, str]:
    if name is None:
        return LOWERINGS[row.lowering], f"the default of {row.name}"
    lowering = find_row(LOWERINGS, name, "lowering")
    if lowering.domain and not row.contrib:
        raise CompileError(
            f"target {row.name} has standard operators only, and {lowering.operator} is of {lowering.domain}; "
            f"use --lowering {row.lowering}"
        )
    if not lowering.runs(row.provider, dtype):
        raise CompileError(
            f"ONNX Runtime cannot run {lowering.operator} in {dtype} for target {row.name}; "
            f"use --lowering {row.lowering}"
        )
    return lowering, "chosen by --lowering"
