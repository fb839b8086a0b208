"""Where ONNX Runtime places each node of a model in a CUDA session, asked on the stand-ins of cuda_stub.py.

`python placement.py MODEL` prints it as JSON, in a process of its own, because LD_LIBRARY_PATH counts only when a
process starts.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_stub

from dispc.errors import ArtifactError
from dispc.validate import placement
from dispc.validate.placement import Placement
from dispc.validate.session import CPU, CUDA

__all__ = ["CPU", "CUDA", "Placement", "place"]


def place(model: Path, stub: Path) -> Placement:
    """Load `model` in a CUDA session on the stand-ins in `stub`.

    Raises:
        RuntimeError: when there is no session, or none with the CUDA provider, with what ONNX Runtime said.
    """
    command = [sys.executable, str(Path(__file__).resolve()), str(model)]
    done = subprocess.run(command, env=cuda_stub.environment(stub), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"no CUDA session for {model} (exit {done.returncode}):\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    assigned = {name: (op, provider) for name, (op, provider) in found["assigned"].items()}
    return Placement(CUDA, assigned, found["optimised"], frozenset(found["expected"]))


def main(model: str) -> None:
    try:
        found = placement.place(Path(model), CUDA)
    except ArtifactError as error:
        sys.exit(str(error))
    print(json.dumps({"assigned": found.assigned, "optimised": found.optimised, "expected": sorted(found.expected)}))


if __name__ == "__main__":
    main(sys.argv[1])
