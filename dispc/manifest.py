"""dispc.json: what an artifact says about itself. Its presence is what makes a directory an artifact."""

import json
from pathlib import Path
from typing import Any

from dispc.errors import ArtifactError

MANIFEST = "dispc.json"


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
    return content
