"""Files of torch that others wrote: tensors and plain values are read from them, and nothing in them is executed."""

import warnings
from pathlib import Path
from typing import Any

import torch

from dispc.support.errors import DispcError, first_line
from dispc.support.inputs import regular


def load_torch(path: Path, error: type[DispcError], otherwise: str, *, mmap: bool = False) -> Any:
    """What is in a file of torch, with tensors on the CPU; `mmap` leaves their values in the file.

    Raises:
        error: when it is no regular file, or cannot be loaded safely: `otherwise` says what the path is not.
        FileNotFoundError, NotADirectoryError, PermissionError: when there is nothing to look at.
    """
    regular(path, error)
    try:
        with warnings.catch_warnings():  # of old protocols and rare tensors: what is not accepted is an error below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as reason:  # a damaged pickle raises whatever its instructions run into
        raise error(f"{path}: {otherwise} ({first_line(reason)})") from reason


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor are there, one beside the other: not sparse, nested, quantised, or without any."""
    stored = tensor.layout is torch.strided and tensor.device.type == "cpu"
    return stored and not tensor.is_nested and not tensor.is_quantized
