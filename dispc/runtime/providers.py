"""The execution providers of ONNX Runtime that artifacts run on: one row each. Nothing else compares their names.

To add one, add its row, and a row of `TARGETS` (`dispc.targets`) that names it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dispc import lowerings
from dispc.runtime import devices, doctor
from dispc.support.errors import ArtifactError


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One row.

    name: what ONNX Runtime calls it.
    title: what people call it.
    device: where tensors for it lie, by the names of OrtValue and IO binding; also what `--device` calls it.
    dtypes: the dtypes it has kernels for. An artifact in another is run with its weights widened to float32.
    fallback: it runs artifacts made for any other provider; those in half precision are widened, since its own
        half-precision kernels round otherwise, or lack an operator.
    graph_options: provider options that capture a run as a graph and replay it; None where it cannot.
    exact_options: provider options that make it multiply float32 as float32.
    genai: its key in genai_config.json; None for onnxruntime-genai's default.
    genai_build: which build of onnxruntime-genai has it, as the model card says it.
    chunk: tokens given at once when reading a long text; None for all of them.
    problem: why it does not load on this machine, in one line; None when it does.
    preload: loads the libraries it needs that the system would not find.
    processor: the name of what it runs on.
    copy_speed: bytes per second that the device copies, read and written, with so many threads.
    peak_bytes: the most memory that this process had on the device; None where nobody says.
    """

    name: str
    title: str
    device: str
    dtypes: tuple[str, ...]
    fallback: bool = False
    graph_options: dict[str, str] | None = None
    exact_options: dict[str, str] = field(default_factory=dict)
    genai: str | None = None
    genai_build: str = ""
    chunk: int | None = None
    problem: Callable[[], str | None]
    preload: Callable[[], object]
    processor: Callable[[], str]
    copy_speed: Callable[[int], float]
    peak_bytes: Callable[[], int | None]

    def __str__(self) -> str:
        return self.name

    def require(self, what: str, remedy: str) -> None:
        """Raise ArtifactError when it does not load here: `what` wanted it, `remedy` is what to do instead."""
        if problem := self.problem():
            raise ArtifactError(
                f"{what}, {self.title} does not load here: {problem}; dispc doctor has details, {remedy}"
            )

    def genai_options(self, *, graph: bool, dtype: str) -> list[dict[str, Any]]:
        """`provider_options` of a genai_config.json, with or without graph capture."""
        if self.genai is None:
            return []
        exact = self.exact_options if dtype == "float32" else {}
        return [{self.genai: (dict(self.graph_options or {}) if graph else {}) | exact}]


CPU = Provider(
    name=lowerings.CPU,
    title="the CPU",
    device="cpu",
    dtypes=("float32", "float16"),
    fallback=True,
    chunk=256,  # its attention computes all S x T scores of a call: 2,048 tokens take 0.7 times as long in pieces
    problem=lambda: None,
    preload=lambda: None,
    processor=devices.cpu_name,
    copy_speed=devices.copy_speed_of_cpu,
    peak_bytes=devices.peak_resident_bytes,
)
"""Every build of ONNX Runtime has it, and puts on it what another provider leaves."""

CUDA = Provider(
    name=lowerings.CUDA,
    title="CUDA",
    device="cuda",
    dtypes=("float32", "float16", "bfloat16"),
    graph_options={"enable_cuda_graph": "1"},
    exact_options={"use_tf32": "0"},  # its default multiplies float32 with 10 bits of mantissa (TF32)
    genai="cuda",
    genai_build="its CUDA build",
    problem=lambda: doctor.cuda_problem(),
    preload=doctor.preload,
    processor=devices.gpu_name,
    copy_speed=lambda threads: devices.copy_speed_of_gpu(),
    peak_bytes=devices.gpu_bytes,
)

PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in (CPU, CUDA)}
