"""dispc.json: the facts of an artifact. Its presence is what makes a directory an artifact."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dispc.algorithms import ALGORITHMS
from dispc.masks import Masks
from dispc.quantisation import BLOCK_SIZES, Quantisation
from dispc.selection import SelectionCosts
from dispc.support.dtypes import ARTIFACT_DTYPES
from dispc.support.errors import ArtifactError, MasksError
from dispc.support.inputs import LARGEST, LEAST_POSITIONS, read_object
from dispc.support.typed_json import OPTIONAL, UNSTORED, from_json, to_json

MANIFEST, WEIGHTS = "dispc.json", "model.onnx.data"
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a model directory that an artifact has copies of, where they are there."""
WRITTEN = (MANIFEST, "model.onnx", WEIGHTS, "genai_config.json", "masks.safetensors", "README.md", *COPIED)
"""What an artifact may hold, beside licence files."""
LICENCE_FILES = re.compile(r"(licen[cs]e|notice|use_policy)([\w-]*|[\w.-]*\.(txt|md|rst|html|pdf))", re.IGNORECASE)
IN_GRAPH = {
    "dispc": "dispc.version",
    "target": "dispc.target",
    "padding": "dispc.padding",
    "pipeline": "dispc.passes",
    "masks_sha256": "dispc.masks_sha256",
}
"""Facts of a manifest that the metadata of model.onnx has too, and their keys there."""
MIB = 2**20
COMPARABLE = ("config_sha256", "target", "dtype", "padding", "quantisation", "logits", "align", "fusions")
"""What an artifact and the dense one that it is compared with must have in common."""


def licence_files(directory: Path) -> list[str]:
    """The names of the files of a model directory that say what may be done with it."""
    return sorted(file.name for file in directory.iterdir() if LICENCE_FILES.fullmatch(file.name) and file.is_file())


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What `--tune` measured: the blocks that were timed, and where.

    `milliseconds` has for each lowering the medians `first_token` and `one_token`.
    """

    blocks: tuple[int, ...]
    threads: int | None
    device: str
    milliseconds: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class LoweringChoice:
    """The lowering and why it was chosen.

    `filled` names the sets that are zeros in the weights, as `3.mlp.read`, chosen by `costs`; None where the plan fills
    none.
    """

    name: str
    reason: str = ""
    filled: tuple[str, ...] | None = field(default=None, metadata=OPTIONAL)
    costs: SelectionCosts | None = field(default=None, metadata=OPTIONAL)
    tuned: Tuning | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class BlockParameters:
    """Projection weights of all blocks: of the dense model, and of those kept."""

    dense: int
    kept: int

    @property
    def share(self) -> str:
        """The percentage kept."""
        return f"{100 * self.kept / max(self.dense, 1):.1f} %"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The opset and IR version of the graph, and the first ONNX Runtime that runs it (such as `1.18`)."""

    opset: int = 23
    ir_version: int = 10
    onnxruntime: str = "1.24"

    def __str__(self) -> str:
        return f"ONNX Runtime {self.onnxruntime} or newer (opset {self.opset})"


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass did: its options, rewrites made, nodes, seconds; and what it did not rewrite, with the reason."""

    name: str
    options: Mapping[str, object] = field(default_factory=dict)
    rewrites: int = 0
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    left: tuple[str, ...] = field(default=(), metadata=UNSTORED)

    def __str__(self) -> str:
        return spell_pass(self.name, self.options)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of dispc.json. Fields with a default are missing in what earlier versions of dispc wrote.

    `versions` are of Python and of packages, `pipeline` spells the passes with their options, `widths` has a row for
    each block: the length of each of its sets. `validation` is the report of the validation at the end of compiling,
    as `Report.as_dict` gives it; it is not checked when the manifest is read.
    """

    dispc: str
    versions: Mapping[str, str] = field(default_factory=dict)
    model_type: str
    target: str
    dtype: str
    padding: str
    lowering: LoweringChoice
    align: int = 1
    fusions: tuple[str, ...] | None = None
    logits: str = "all"
    cuda_graph: bool = False
    quantisation: Quantisation | None = None
    attention: str
    positions: int
    notes: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...]
    norm_scope: str
    masks_sha256: str
    config_sha256: str
    block_parameters: BlockParameters
    cache_layers: int = 0
    widths: tuple[Mapping[str, int], ...] = ()
    nodes: int
    needs: Needs = Needs()
    passes: tuple[PassRecord, ...] = ()
    pipeline: str = ""
    trace_seconds: float | None = field(default=None, metadata=OPTIONAL)
    bytes: int
    compile_seconds: float | None = field(default=None, metadata=OPTIONAL)
    validation_seconds: float | None = field(default=None, metadata=OPTIONAL)
    validation: Mapping[str, Any] | None = field(default=None, metadata=OPTIONAL)

    def to_json(self) -> dict[str, Any]:
        """As dispc.json holds it: dicts, lists and scalars."""
        content: dict[str, Any] = to_json(self)
        return content

    @property
    def not_rewritten(self) -> list[str]:
        """What the passes left as it was, and why; nothing of it is stored."""
        return [f"{record.name}: {reason}" for record in self.passes for reason in record.left]

    @property
    def passed(self) -> bool | None:
        """Whether the validation at the end of compiling passed; None when there was none."""
        return None if self.validation is None else self.validation.get("passed") is True

    @property
    def shares_buffer(self) -> bool:
        """Past and present caches may be one buffer: GroupQueryAttention with padding on the right."""
        return self.padding == "right" and self.attention == "GroupQueryAttention"


def require_comparable(artifact: Path, dense: Path) -> None:
    """Raise ArtifactError unless `dense` is dense, and otherwise compiled as `artifact` was."""
    ours, theirs = read_manifest(artifact), read_manifest(dense)
    if theirs.block_parameters.kept != theirs.block_parameters.dense:
        raise ArtifactError(f"{dense}: is pruned; compile one with --dense, or let --build-dense do it")
    for name in COMPARABLE:
        wanted, found = getattr(ours, name), getattr(theirs, name)
        if wanted != found:
            what = "was compiled from another model" if name == "config_sha256" else f"has {name} {_shown(found)}"
            raise ArtifactError(f"{dense}: {what}, unlike {artifact}; --build-dense compiles the right one")


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def spell_pass(name: str, options: Mapping[str, object]) -> str:
    """A pass in a line of passes: its name, and its options in braces where it has some."""
    spelled = " ".join(f"{key}={str(value).lower()}" for key, value in options.items())
    return f"{name}{{{spelled}}}" if spelled else name


def read_manifest(artifact: Path) -> Manifest:
    """The dispc.json of an artifact.

    Raises:
        ArtifactError: when the directory holds none that can be read, or a field is missing or of another type.
    """
    path = artifact / MANIFEST
    try:
        content = read_object(path, ArtifactError)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{artifact}: is not an artifact of dispc (no {MANIFEST})") from error
    if "target" not in content:
        raise ArtifactError(f"{path}: is not the {MANIFEST} of an artifact")
    manifest = from_json(Manifest, content, path, ArtifactError)
    if manifest.dtype not in ARTIFACT_DTYPES:
        raise ArtifactError(f"{path}: unknown dtype {manifest.dtype!r}")
    if manifest.quantisation and manifest.quantisation.algorithm not in ALGORITHMS:
        raise ArtifactError(f"{path}: unknown algorithm {manifest.quantisation.algorithm!r}")
    for name, value, fits in _values_in_range(manifest):
        if not fits:
            raise ArtifactError(f"{path}: {name} is {value!r}, which no artifact has")
    return manifest


def _values_in_range(manifest: Manifest) -> Iterator[tuple[str, object, bool]]:
    """Fields that something is made or taken from: name, value, and whether an artifact may have it."""
    yield "positions", manifest.positions, LEAST_POSITIONS <= manifest.positions <= LARGEST
    yield "align", manifest.align, 1 <= manifest.align <= LARGEST
    yield "padding", manifest.padding, manifest.padding in ("left", "right")
    for name, size in (("bytes", manifest.bytes), ("block_parameters.kept", manifest.block_parameters.kept)):
        yield name, size, 0 <= size < 2**63
    if quantisation := manifest.quantisation:
        yield "bits", quantisation.bits, quantisation.bits in (4, 8)
        yield "block_size", quantisation.block_size, quantisation.block_size in BLOCK_SIZES


def summary(manifest: Manifest) -> dict[str, str]:
    """The facts of an artifact, in words."""
    blocks = manifest.block_parameters
    return {
        "block parameters": f"{blocks.kept:,} of {blocks.dense:,} ({blocks.share})",
        "bytes": f"{manifest.bytes / MIB:,.1f} MiB",
        "nodes": str(manifest.nodes),
        "attention": f"{manifest.attention}, padding {manifest.padding}",
        "norm scope": manifest.norm_scope,
        "lowering": f"{manifest.lowering.name} ({manifest.lowering.reason})",
        "quantised": str(manifest.quantisation or "no"),
        "runs in": str(manifest.needs),
    }


def foreign_to_artifact(directory: Path) -> str | None:
    """What in a directory makes it something else than an artifact that dispc wrote; None when it is just that."""
    try:
        manifest = read_manifest(directory)
    except ArtifactError as error:
        return str(error).removeprefix(f"{directory}: ")
    for path in sorted(directory.iterdir()):
        known = path.name in WRITTEN or LICENCE_FILES.fullmatch(path.name)
        if not known or (path.is_dir() and not path.is_symlink()):
            return f"holds {path.name}, which is not of the artifact"
    masks = directory / "masks.safetensors"
    try:
        if masks.exists() and Masks.load(masks).sha256() != manifest.masks_sha256:
            return "holds other masks than those that the artifact was compiled with"
    except (MasksError, OSError) as error:
        return str(error).removeprefix(f"{directory}: ")
    return None
