"""config.json of every tiny variant as each release of transformers writes it.

`python tests/shared/saved_configs.py`, once with each release, adds variants to saved_configs.json.
"""

import json
from pathlib import Path
from typing import Any

import tiny

from dispc.model.checkpoint import Checkpoint

FILE = Path(__file__).with_name("saved_configs.json")
RELEASES = ("4", "5")
EVERY = tiny.VARIANTS | tiny.FURTHER | tiny.RARE


def load() -> dict[str, dict[str, dict[str, Any]]]:
    """Raw configs by variant and release."""
    content: dict[str, dict[str, dict[str, Any]]] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def write_as_installed(variant: str) -> dict[str, Any]:
    """What the installed release writes for `variant`, without its exact version."""
    from transformers import AutoConfig

    model_type, options = EVERY[variant]
    config = AutoConfig.for_model(model_type, **json.loads(json.dumps(options)))
    written: dict[str, Any] = json.loads(config.to_json_string())
    return {key: value for key, value in sorted(written.items()) if key != "transformers_version"}


def installed() -> str:
    """The release of the installed transformers, as `RELEASES` has it."""
    import transformers

    return str(transformers.__version__).partition(".")[0]


def stored(raw: dict[str, Any], directory: Path) -> Checkpoint:
    """A checkpoint of `raw` as its config.json, without weights."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    return Checkpoint(directory)


if __name__ == "__main__":
    saved = load() if FILE.exists() else {}
    for name in EVERY:
        saved.setdefault(name, {})[installed()] = write_as_installed(name)
    lines = [f"{json.dumps(name)}: " + json.dumps(saved[name], sort_keys=True) for name in EVERY]
    FILE.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
