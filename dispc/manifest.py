"""dispc.json: what an artifact says about itself. Its presence is what makes a directory an artifact."""

import json
from pathlib import Path
from typing import Any

from dispc.errors import ArtifactError

MANIFEST = "dispc.json"
FIELDS: dict[str, type] = {
    "dispc": str, "model_type": str, "target": str, "dtype": str, "padding": str, "lowering": dict, "attention": str,
    "positions": int, "stop_tokens": list, "norm_scope": str, "masks_sha256": str, "config_sha256": str,
    "block_parameters": dict, "bytes": int, "nodes": int,
}  # fmt: skip
"""What every manifest holds, among others."""
DTYPES = ("float32", "float16", "bfloat16")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(artifact: Path) -> dict[str, Any]:
    """The dispc.json of an artifact.

    Raises:
        ArtifactError: when the directory holds none that can be read.
    """
    path = artifact / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{artifact}: is not an artifact of dispc (no {MANIFEST})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict) or "target" not in content:
        raise ArtifactError(f"{path}: is not the {MANIFEST} of an artifact")
    for name, kind in FIELDS.items():
        if not isinstance(content.get(name), kind):
            raise ArtifactError(f"{path}: {name} is missing or malformed")
    if content["dtype"] not in DTYPES:
        raise ArtifactError(f"{path}: unknown dtype {content['dtype']!r}")
    return content
