"""Facts of the devices: their names, how fast they copy, the peak of memory."""

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dispc.lowerings import CUDA
from dispc.support.errors import DispcError

if TYPE_CHECKING:
    import torch

COPY_BYTES = 2**28


def torch_device(name: str | None) -> "torch.device":
    """`cpu`, `cuda` or `cuda:N`; None is cuda where there is one, else cpu.

    Raises:
        DispcError: for another name, or a CUDA device that torch does not see.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise DispcError(f"--device {name}: no such device; choose cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DispcError(f"--device {name}: torch sees no CUDA device; choose --device cpu, or install a CUDA build")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DispcError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA device(s), counted from 0")
    return device


def cpu_name() -> str:
    """The processor's model and the number of its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def gpu_name() -> str:
    """The GPU as torch calls it."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CUDA device (this torch cannot name it)"


def copy_speed_of_cpu(threads: int) -> float:
    """Bytes per second, read and written, of the fastest of ten copies of 256 MiB; `threads` 0 leaves their number."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    source, target = torch.zeros(COPY_BYTES, dtype=torch.uint8), torch.ones(COPY_BYTES, dtype=torch.uint8)
    return _fastest(lambda: target.copy_(source))


def copy_speed_of_gpu() -> float:
    """The same in the memory of the GPU.

    An Identity node between two buffers: ONNX Runtime copies, and torch need not know CUDA.
    """
    import numpy as np
    import onnx

    from dispc.runtime.ort import ort

    size = COPY_BYTES // 4
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [size]) for name in "xy"]
    node = onnx.helper.make_node("Identity", ["x"], ["y"], name="copy")
    graph = onnx.helper.make_graph([node], "copy", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session: Any = ort.InferenceSession(model.SerializeToString(), options, providers=[CUDA], enable_fallback=0)
    buffers = [ort.OrtValue.ortvalue_from_shape_and_type([size], np.float32, "cuda") for _ in range(2)]
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", buffers[0])
    binding.bind_ortvalue_output("y", buffers[1])

    def copy() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return _fastest(copy)


def _fastest(copy: Callable[[], object]) -> float:
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / min(seconds)


def peak_resident_bytes() -> int | None:
    """The most memory that this process had at once; None where it is not known."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), None)


def gpu_bytes() -> int | None:
    """What this process has of the GPU's memory, as nvidia-smi sees it; None where there is none."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    own = [line.split(",")[1] for line in lines if line.split(",")[0].strip() == str(os.getpid())]
    return int(own[0]) * 2**20 if own and own[0].strip().isdigit() else None
