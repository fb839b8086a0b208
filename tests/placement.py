"""Where ONNX Runtime places each node of a model in a CUDA session.

ONNX Runtime records providers when it partitions the graph: after its basic optimisations (constant folding,
removal of identities), before its fusions and before it inserts copies. What the session finally runs is in
the optimised graph, which names no providers. So both are told.

`python placement.py MODEL` prints the two as JSON, in a process of its own, because LD_LIBRARY_PATH (the
stand-ins of cuda_stub.py) counts only when a process starts.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import cuda_stub

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class Placement(NamedTuple):
    """Node name -> (operator, provider) as partitioned; node name -> operator as run (copies are Memcpy*)."""

    assigned: dict[str, tuple[str, str]]
    optimised: dict[str, str]


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
    return Placement({name: (op, provider) for name, (op, provider) in found["assigned"].items()}, found["optimised"])


def main(model: str) -> None:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    with tempfile.TemporaryDirectory() as directory:
        options.optimized_model_filepath = f"{directory}/optimised.onnx"
        session = onnxruntime.InferenceSession(model, options, providers=[CUDA, CPU])
        if CUDA not in session.get_providers():
            sys.exit("ONNX Runtime fell back to the CPU: the CUDA provider did not load")
        optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
    assigned = [
        (node.name, (node.op_type, part.ep_name))
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    run = [(node.name, node.op_type) for node in optimised.graph.node]
    for names in ([name for name, _ in assigned], [name for name, _ in run]):
        shared = [name for name, uses in Counter(names).items() if uses > 1 or not name]
        if shared:
            sys.exit(f"nodes without a name of their own: {shared}")
    print(json.dumps({"assigned": dict(assigned), "optimised": dict(run)}))


if __name__ == "__main__":
    main(sys.argv[1])
