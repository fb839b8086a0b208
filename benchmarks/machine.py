"""The machine that a benchmark runs on: hardware, load, versions."""

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = ("dispc", "export", "passes")
GPU_FACTS = (
    *("name", "driver_version", "clocks.max.sm", "clocks.max.mem"),
    *("clocks.sm", "clocks.mem", "power.limit", "temperature.gpu"),
)
PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime-gpu", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """Hardware, load, and the versions that are measured."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": load(),
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "dispc_revision": _git("rev-parse", "--short", "HEAD"),
        "dispc_changed_files": len(_git("status", "--porcelain", "--", *SOURCES).splitlines()),
        "command": " ".join(sys.argv),
    }


def graphics_cards() -> list[dict[str, str]] | None:
    """Driver, clocks and limits of every GPU now, by nvidia-smi; None where that fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(GPU_FACTS, parts, strict=True)) for parts in lines]


def load() -> dict[str, Any]:
    """Load averages, and the other processes that used more than half a core during the last 0.3 seconds."""

    def ticks() -> dict[str, int]:
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, _, fields = stat.read_text().partition("(")[2].rpartition(")")
            except OSError:  # ended meanwhile
                continue
            user, system = fields.split()[11:13]
            found[f"{stat.parent.name} {name}"] = int(user) + int(system)
        return found

    before = ticks()
    time.sleep(0.3)
    limit = 0.15 * os.sysconf("SC_CLK_TCK")
    busy = [name for name, now in ticks().items() if now - before.get(name, now) > limit]
    return {"average": [round(value, 2) for value in os.getloadavg()], "busy_processes": busy}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()
