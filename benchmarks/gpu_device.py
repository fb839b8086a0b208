"""The device that gpu_cells.py measures on: its memory and its bandwidth."""

import gc
from typing import Any

import torch
from common import GIB
from machine import graphics_cards

from dispc.runtime.timing import alternate


def copy_rate(device: str) -> float:
    """GB/s of a large copy within the device's memory, bytes read and bytes written together."""
    size = 2 * GIB if device == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * size / min(alternate({"": copy}, 3, 5)[""]) / 10**6


def require_memory(device: str, needed: int, what: str) -> None:
    """Raise MemoryError when `needed` bytes are more than the device has free."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        if needed > free:
            raise MemoryError(f"{what} need about {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free")


def release_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def describe_device(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": device}
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        found = {"name": facts.name, "memory_gib": round(facts.total_memory / GIB, 1), "cuda": torch.version.cuda}
    found["copy_gb_per_second"] = round(copy_rate(device), 1)
    return {"device": found | {"graphics_cards": graphics_cards()}}  # their clocks right after the copies, not idle
