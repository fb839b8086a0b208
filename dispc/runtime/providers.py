"""Devices of torch by name, refused in one line where they are not there; and what a processor is called."""

import os
import platform
import re
from pathlib import Path

import torch

from dispc.support.errors import DispcError


def torch_device(name: str | None) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`; None is cuda where there is one, else cpu.

    Raises:
        DispcError: for another name, or a CUDA device that torch does not see.
    """
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


def processor_name(*, cuda: bool) -> str:
    """The GPU or the CPU that runs an artifact: times compare on the same one only."""
    if cuda:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "CUDA device (this torch cannot name it)"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
