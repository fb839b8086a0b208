"""Where ONNX Runtime places each node of a model in a CUDA session, asked on the stand-ins of cuda_stub.py.

`python placement.py MODEL...` prints a line of JSON for each, in a process of its own, because LD_LIBRARY_PATH counts
only when a process starts.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import cuda_stub

from dispc.runtime import placement
from dispc.runtime.placement import Placement
from dispc.runtime.providers import CPU, CUDA
from dispc.support.errors import ArtifactError

__all__ = ["CPU", "CUDA", "Placement", "place"]


def place(models: Sequence[Path], stub: Path) -> list[Placement]:
    """Load each of `models` in a CUDA session on the stand-ins in `stub`, one process for all.

    Raises:
        RuntimeError: when one has no session, or none with the CUDA provider, with what ONNX Runtime said.
    """
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, models)]
    done = subprocess.run(command, env=cuda_stub.environment(stub), capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode != 0:
        raise RuntimeError(f"no CUDA session for {models[len(lines)]} (exit {done.returncode}):\n{done.stderr}")
    return [
        Placement(
            CUDA,
            {name: (op, provider) for name, (op, provider) in found["assigned"].items()},
            found["optimised"],
            frozenset(found["expected"]),
        )
        for found in lines
    ]


def main(model: str) -> None:
    try:
        found = placement.place(Path(model), CUDA)
    except ArtifactError as error:
        sys.exit(str(error))
    line = {"assigned": found.assigned, "optimised": found.optimised, "expected": sorted(found.expected)}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(argument)
