"""dispc.json: what an artifact says about itself. Its presence is what makes a directory an artifact."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dispc.quantisation import Quantisation
from dispc.support.dtypes import ARTIFACT_DTYPES
from dispc.support.errors import ArtifactError
from dispc.support.inputs import read_object

MANIFEST = "dispc.json"
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
WRITTEN = (MANIFEST, "model.onnx", "model.onnx.data", "genai_config.json", "masks.safetensors", "README.md", *COPIED)
"""What an artifact may hold, beside licence files."""
LICENCE_FILES = re.compile(r"(licen[cs]e|notice|use_policy)[\w.-]*", re.IGNORECASE)
FIELDS: dict[str, type] = {
    "dispc": str,
    "model_type": str,
    "target": str,
    "dtype": str,
    "padding": str,
    "lowering.name": str,
    "attention": str,
    "positions": int,
    "stop_tokens": list,
    "norm_scope": str,
    "masks_sha256": str,
    "config_sha256": str,
    "block_parameters.dense": int,
    "block_parameters.kept": int,
    "bytes": int,
    "nodes": int,
}
"""What every manifest holds, among others; a dot leads into an object."""
MIB = 2**20


COMPARABLE = ("config_sha256", "target", "dtype", "padding", "quantisation", "logits", "align", "fusions")
"""What a dense artifact must have in common with the one that it is the measure for."""


def require_comparable(artifact: Path, dense: Path) -> None:
    """Raise ArtifactError unless `dense` is dense, and otherwise compiled as `artifact` was."""
    ours, theirs = read_manifest(artifact), read_manifest(dense)
    blocks = theirs["block_parameters"]
    if blocks["kept"] != blocks["dense"]:
        raise ArtifactError(f"{dense}: is pruned; compile one with --dense, or let --build-dense do it")
    for name in COMPARABLE:
        if ours.get(name) != theirs.get(name):
            what = "was compiled from another model" if name == "config_sha256" else f"has {name} {theirs.get(name)}"
            raise ArtifactError(f"{dense}: {what}, unlike {artifact}; --build-dense compiles the right one")


def needed_versions(manifest: Mapping[str, Any]) -> str:
    """Which ONNX Runtime an artifact needs, in words; those compiled before dispc said so need 1.24."""
    needs = manifest.get("needs") or {"onnxruntime": "1.24", "opset": 23}
    return f"ONNX Runtime {needs['onnxruntime']} or newer (opset {needs['opset']})"


def spell_pass(name: str, options: Mapping[str, object]) -> str:
    """A pass in a line of passes: its name, and its options in braces where it has some."""
    spelled = " ".join(f"{key}={str(value).lower()}" for key, value in options.items())
    return f"{name}{{{spelled}}}" if spelled else name


def read_manifest(artifact: Path) -> dict[str, Any]:
    """The dispc.json of an artifact.

    Raises:
        ArtifactError: when the directory holds none that can be read.
    """
    path = artifact / MANIFEST
    try:
        content = read_object(path, ArtifactError)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{artifact}: is not an artifact of dispc (no {MANIFEST})") from error
    if "target" not in content:
        raise ArtifactError(f"{path}: is not the {MANIFEST} of an artifact")
    for name, kind in FIELDS.items():
        if not isinstance(_field(content, name), kind):
            raise ArtifactError(f"{path}: {name} is missing or malformed")
    if content["dtype"] not in ARTIFACT_DTYPES:
        raise ArtifactError(f"{path}: unknown dtype {content['dtype']!r}")
    return content


def summary(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The facts of an artifact, in words."""
    blocks = manifest["block_parameters"]
    quantisation = manifest.get("quantisation")
    lowering, shares = manifest["lowering"], f"{100 * blocks['kept'] / blocks['dense']:.1f} %"
    return {
        "block parameters": f"{blocks['kept']:,} of {blocks['dense']:,} ({shares})",
        "bytes": f"{manifest['bytes'] / MIB:,.1f} MiB",
        "nodes": str(manifest["nodes"]),
        "attention": f"{manifest['attention']}, padding {manifest['padding']}",
        "norm scope": manifest["norm_scope"],
        "lowering": f"{lowering['name']} ({lowering['reason']})",
        "quantised": str(Quantisation(**quantisation)) if quantisation else "no",
        "runs in": needed_versions(manifest),
    }


def foreign_content(directory: Path) -> str | None:
    """What in a directory makes it something else than an artifact that dispc wrote; None when it is just that."""
    try:
        read_manifest(directory)
    except ArtifactError as error:
        return str(error).removeprefix(f"{directory}: ")
    for path in sorted(directory.iterdir()):
        if path.name not in WRITTEN and not LICENCE_FILES.fullmatch(path.name):
            return f"holds {path.name}, which is not of the artifact"
    return None


def _field(content: Any, name: str) -> Any:
    for key in name.split("."):
        content = content.get(key) if isinstance(content, dict) else None
    return content
