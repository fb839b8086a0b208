"""Stand-ins for the CUDA libraries that ONNX Runtime's CUDA provider links against.

With them on LD_LIBRARY_PATH, a machine without a GPU can create a real CUDA session: the real graph
optimisers run, every node is really assigned to an execution provider, and kernels are really constructed (so
a missing kernel or a bad attribute is reported). No kernel computes anything: device memory is host memory,
launches do nothing. CUDA graphs are captured and launched, empty: the file that CUDA_STUB_LOG names gets a line
for each. CUDA_STUB_FAILURE is the error that the device answers with. Good for placement and fusion checks; worthless
for numbers and for speed.

Needs onnxruntime-gpu (a CUDA 13 build), gcc, binutils, and CUDA 13's headers (the wheels nvidia-cuda-runtime
and nvidia-cuda-crt, or a toolkit).
"""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

CUDART = r"""
#include <driver_types.h>
#include <stdio.h>
static void *fatbin[4];
static int failure(void) { const char *e = getenv("CUDA_STUB_FAILURE"); return e ? atoi(e) : 0; }
static void note(const char *what, void *graph) {
  const char *path = getenv("CUDA_STUB_LOG");
  FILE *file = path ? fopen(path, "a") : 0;
  if (file) { fprintf(file, "%s %p\n", what, graph); fclose(file); } }
void **__cudaRegisterFatBinary(void *p) { return (void **)fatbin; }
int cudaMalloc(void **p, size_t n) { *p = calloc(1, n ? n : 1); return 0; }
int cudaMallocHost(void **p, size_t n) { *p = calloc(1, n ? n : 1); return 0; }
int cudaHostAlloc(void **p, size_t n, unsigned f) { *p = calloc(1, n ? n : 1); return 0; }
int cudaMallocFromPoolAsync(void **p, size_t n, void *q, void *s) { *p = calloc(1, n ? n : 1); return 0; }
int cudaFree(void *p) { free(p); return 0; }
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaFreeAsync(void *p, void *s) { free(p); return 0; }
int cudaMemcpy(void *d, const void *s, size_t n, int k) { memcpy(d, s, n); return 0; }
int cudaMemcpyAsync(void *d, const void *s, size_t n, int k, void *t) { memcpy(d, s, n); return 0; }
int cudaMemset(void *d, int v, size_t n) { memset(d, v, n); return 0; }
int cudaMemsetAsync(void *d, int v, size_t n, void *s) { memset(d, v, n); return 0; }
int cudaGetDeviceCount(int *c) { *c = 1; return 0; }
int cudaGetDevice(int *c) { *c = 0; return 0; }
int cudaSetDevice(int d) { return failure(); }
int cudaStreamEndCapture(void *s, void **g) { *g = malloc(64); note("capture", *g); return 0; }
int cudaGraphInstantiate(void **e, void *g, unsigned long long f) { *e = g; return 0; }
int cudaGraphLaunch(void *e, void *s) { note("launch", e); return 0; }
int cudaMemGetInfo(size_t *f, size_t *t) { *f = *t = 80ull << 30; return 0; }
int cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
int cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p); strcpy(p->name, "stub"); p->major = 9; p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->multiProcessorCount = 132; p->totalGlobalMem = 80ull << 30; p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448; p->sharedMemPerMultiprocessor = 233472; p->regsPerBlock = 65536;
  p->maxThreadsPerMultiProcessor = 2048; p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64; p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  return 0; }
int cudaDeviceGetAttribute(int *v, int a, int d) {
  *v = a == 75 ? 9 : a == 76 ? 0 : a == 16 ? 132 : 1024; return 0; }
int cudaStreamCreate(void **s) { *s = malloc(64); return 0; }
int cudaStreamCreateWithFlags(void **s, unsigned f) { *s = malloc(64); return 0; }
int cudaStreamDestroy(void *s) { free(s); return 0; }
int cudaStreamIsCapturing(void *s, int *st) { *st = 0; return 0; }
int cudaEventCreate(void **s) { *s = malloc(64); return 0; }
int cudaEventCreateWithFlags(void **s, unsigned f) { *s = malloc(64); return 0; }
int cudaEventDestroy(void *s) { free(s); return 0; }
int cudaMemPoolCreate(void **s, void *p) { *s = malloc(64); return 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a); a->type = cudaMemoryTypeDevice; a->devicePointer = (void *)p; return 0; }
const char *cudaGetErrorName(int e) { return "stub"; }
const char *cudaGetErrorString(int e) { return "stub"; }
"""
DEFINED = frozenset(re.findall(r"\b((?:__)?cuda\w+)\(", CUDART))


class StubUnavailableError(RuntimeError):
    """This machine lacks something that the stand-ins are built from; the message says what."""


def ensure(cache: Path) -> Path:
    """The directory of the stand-ins under `cache`: built on the first call, whichever process makes it."""
    provider, include = _provider(), _include()
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    directory = cache / f"ort-{version('onnxruntime-gpu')}-{recipe}"
    with FileLock(cache / "lock"):
        if not directory.exists():
            building = Path(tempfile.mkdtemp(dir=cache))
            try:
                _build(provider, include, building)
                building.rename(directory)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return directory


def environment(stub: Path) -> dict[str, str]:
    """The variables of a process that is to use the stand-ins."""
    return {**os.environ, "LD_LIBRARY_PATH": str(stub)}


def _provider() -> Path:
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise StubUnavailableError("onnxruntime is not installed")
    provider = Path(spec.origin).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.exists():
        raise StubUnavailableError(f"onnxruntime has no CUDA provider ({provider}): install onnxruntime-gpu")
    for tool in ("gcc", "nm", "readelf"):
        if shutil.which(tool) is None:
            raise StubUnavailableError(f"{tool} is not installed")
    return provider


def _include() -> Path:
    wheels = Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/include")
    for place in (*wheels, *sorted(Path("/usr/local").glob("cuda-13*/include"))):
        if all((place / header).exists() for header in ("driver_types.h", "crt/host_defines.h")):
            return place
    raise StubUnavailableError("no CUDA 13 headers: install the wheels nvidia-cuda-runtime and nvidia-cuda-crt (13.x)")


def _build(provider: Path, include: Path, out: Path) -> None:
    undefined = subprocess.check_output(["nm", "-D", "--undefined-only", provider], text=True).splitlines()
    symbols = [line.split()[-1] for line in undefined if line.strip()]
    dynamic = subprocess.check_output(["readelf", "-d", provider], text=True)
    needed: list[str] = re.findall(r"NEEDED.*\[(lib(?:cu|nv)\w+\.so\.\d+)\]", dynamic)
    names: dict[str, set[str]] = {soname: set() for soname in needed if soname != "libcuda.so.1"}
    for symbol in symbols:
        name, _, soname = symbol.partition("@")
        if soname.lstrip("@") in names:
            names[soname.lstrip("@")].add(name)
    for soname, functions in names.items():
        source = "#include <stdlib.h>\n#include <string.h>\n"
        if soname.startswith("libcudart."):
            source += CUDART + _definitions(functions - DEFINED, create=False)
        else:
            source += _definitions(functions, create=True)
        _compile(soname, source, include, out, versioned=True)
    driver = {symbol for symbol in symbols if re.match(r"cu[A-Z]", symbol) and "@" not in symbol}
    _compile("libcuda.so.1", _definitions(driver, create=False), include, out, versioned=False)


def _definitions(functions: set[str], *, create: bool) -> str:
    """C functions that report success; with `create`, those named so hand out a handle."""
    handle = "long {}(void **p) {{ if (p) *p = malloc(64); return 0; }}\n"
    plain = "long {}(void) {{ return 0; }}\n"
    return "".join((handle if create and "Create" in name else plain).format(name) for name in sorted(functions))


def _compile(soname: str, source: str, include: Path, out: Path, *, versioned: bool) -> None:
    code, script = out / f"{soname}.c", out / f"{soname}.map"
    code.write_text(source)
    script.write_text(f"{soname} {{ global: *; }};\n")
    command = ["gcc", "-w", "-shared", "-fPIC", "-O1", f"-I{include}", "-o", str(out / soname), str(code)]
    command += [f"-Wl,-soname,{soname}", *([f"-Wl,--version-script={script}"] if versioned else [])]
    subprocess.run(command, check=True)
