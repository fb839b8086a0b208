"""Why CUDA does not load on this machine, and what to install so that it does."""

import ctypes
import functools
import io
import mmap
import platform
import re
import struct
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dispc.lowerings import CPU, CUDA
from dispc.runtime.build import Build, builds, fault, has_gpu_build, mend, unusable
from dispc.support.errors import first_line
from dispc.support.version import versions

REMEDIES = (
    (r"libcuda\.so", "install the NVIDIA driver"),
    (r"libcudnn", "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
    (r"lib(cu|nv)", "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
)
"""Library -> what brings it; the first that matches. [cuda] alone has no cuDNN."""
DEVICE_REMEDIES = (
    (r"CUDA failure 35\b|driver version is insufficient", "update the NVIDIA driver"),
    (r"CUDA failure 100\b|no CUDA-capable device", "no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"),
)
"""Error of the CUDA runtime (cudaErrorInsufficientDriver, cudaErrorNoDevice) -> what to do about it."""
PT_LOAD, PT_DYNAMIC, DT_NEEDED, DT_STRTAB = 1, 2, 1, 5
"""Numbers of the ELF format (man 5 elf)."""
PACKAGES = (
    "onnxruntime-gpu",
    "onnxruntime",
    "onnxruntime-genai-cuda",
    "onnxruntime-genai",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at: whether it is as it should be, what was seen, and what to do about it."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything found, and why CUDA does not work (None: it does)."""

    problem: str | None
    findings: tuple[Finding, ...]
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Diagnosis:
    """Look at the files of ONNX Runtime, its build, the libraries that its CUDA provider needs, and a CUDA session."""
    known = {"python": platform.python_version()} | versions(*PACKAGES)
    findings = [_files(builds())]
    if reason := unusable():
        findings.append(Finding(name="ONNX Runtime", ok=False, detail=reason))
    else:
        findings.append(_providers())
    provider = provider_library()
    if all(finding.ok for finding in findings) and provider is not None:
        libraries = needed_libraries(provider)
        missing = preload()
        findings += [Finding(name=name, ok=False, detail="cannot be loaded", remedy=remedy(name)) for name in missing]
        if not missing:
            findings.append(Finding(name="CUDA libraries", ok=True, detail=f"all of {', '.join(libraries)} load"))
        findings.append(_session())
    broken = [finding for finding in findings if not finding.ok]
    problem = None
    if broken:
        remedies = list(dict.fromkeys(finding.remedy for finding in broken if finding.remedy))
        libraries = [finding.name for finding in broken if ".so" in finding.name]
        what = f"{', '.join(libraries)} cannot be loaded" if libraries else f"{broken[0].name}: {broken[0].detail}"
        problem = what + (f" ({'; '.join(remedies)})" if remedies else "")
    return Diagnosis(problem=problem, findings=tuple(findings), versions=known)


@functools.cache
def cuda_problem() -> str | None:
    """Why a CUDA session cannot be had in this process, in one line; None when it can. Asked once."""
    return examine().problem


def provider_library() -> Path | None:
    """ONNX Runtime's CUDA provider, where this build has one."""
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "capi" / "libonnxruntime_providers_cuda.so"
    return path if path.is_file() else None


def needed_libraries(provider: Path) -> list[str]:
    """The CUDA libraries that a 64-bit ELF library links against (its NEEDED entries), in their order."""
    with provider.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start, (size, count) = struct.unpack_from("<Q", content, 32)[0], struct.unpack_from("<HH", content, 54)
        headers = [struct.unpack_from("<IIQQQQ", content, start + size * number) for number in range(count)]
        dynamic = next((offset, length) for kind, _, offset, _, _, length in headers if kind == PT_DYNAMIC)
        entries = list(struct.iter_unpack("<QQ", content[dynamic[0] : sum(dynamic)]))
        address = next(value for tag, value in entries if tag == DT_STRTAB)
        strings = next(
            address - virtual + offset
            for kind, _, offset, virtual, _, length in headers
            if kind == PT_LOAD and virtual <= address < virtual + length
        )
        starts = [strings + value for tag, value in entries if tag == DT_NEEDED]
        names = [content[at : content.find(b"\0", at)].decode() for at in starts]
    return [name for name in names if name.startswith(("libcu", "libnv"))]


def remedy(library: str) -> str:
    """What to install for a library that does not load."""
    return next((what for pattern, what in REMEDIES if re.match(pattern, library)), "")


def cuda_reason(message: str) -> str:
    """The error of the CUDA runtime, out of the long line that ONNX Runtime makes of it."""
    failure = re.search(r"CU(?:DA|BLAS|DNN) failure \d+: [^;]+", message)
    return failure[0].strip() if failure else message


def driver_remedy(reason: str) -> str:
    """What to do about a device that does not answer, from the error of the CUDA runtime."""
    return next((what for pattern, what in DEVICE_REMEDIES if re.search(pattern, reason, re.IGNORECASE)), "")


def preload() -> list[str]:
    """Load the CUDA libraries that the provider needs, and return those that cannot be.

    Where the system does not find them all, those of the pip packages are loaded, which lie where it does not look.
    """
    from dispc.runtime.ort import ort

    provider = provider_library()
    libraries = needed_libraries(provider) if provider else []
    if all(_loads(name) for name in libraries):
        return []
    with redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()
    return [name for name in libraries if not _loads(name)]


def _files(installed: tuple[Build, ...]) -> Finding:
    """Whether what is installed is whole, and what overwrote what."""
    wrong = fault(installed)
    detail = wrong or "; ".join(
        [f"all of {installed[0]}", *(f"{build} is overwritten by it" for build in installed[1:])]
    )
    return Finding(
        name="ONNX Runtime's files", ok=wrong is None, detail=detail, remedy=mend(installed) if wrong else ""
    )


def _providers() -> Finding:
    """Whether the build has CUDA; where no such build exists, nothing can be done."""
    from dispc.runtime.ort import ort

    providers = ort.get_available_providers()
    ok = CUDA in providers
    detail, remedy = f"onnxruntime {ort.__version__} has {', '.join(providers)}", ""
    if not ok and has_gpu_build():
        detail, remedy = f"{detail}, no CUDA", mend(builds())
    elif not ok:
        here = f"{platform.system()} on {platform.machine()}"
        detail = (
            f"{detail}; there is no CUDA build for {here}: onnx-cuda artifacts are compiled here, and run elsewhere"
        )
    return Finding(name="ONNX Runtime's build", ok=ok, detail=detail, remedy=remedy)


def _session() -> Finding:
    """A session with one node on the CUDA provider."""
    import onnx

    from dispc.runtime.ort import ort

    value = functools.partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT, shape=[1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"], name="identity")
    graph = onnx.helper.make_graph([node], "doctor", [value("x")], [value("y")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the reason is found above; ONNX Runtime would print it once more
    ort.set_default_logger_severity(4)
    try:
        session = ort.InferenceSession(
            model.SerializeToString(),
            options,
            providers=[CUDA, CPU],
            enable_fallback=0,  # falling back prints to standard output, and loses the reason
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        reason = cuda_reason(first_line(error))
        return Finding(name="CUDA session", ok=False, detail=reason, remedy=driver_remedy(reason))
    finally:
        ort.set_default_logger_severity(2)
    if CUDA not in session.get_providers():
        return Finding(name="CUDA session", ok=False, detail="ONNX Runtime fell back to the CPU")
    return Finding(name="CUDA session", ok=True, detail="created, with the CUDA provider")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
