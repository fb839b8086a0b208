"""The stages of gpu_minutes.py, each in processes of its own, which may die."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from children import Record, read_records
from gpu_jobs import COMPILED, EAGER, GRAPHED, ONNX_RUNTIME, Cell, Job, run_jobs
from gpu_prepare import PRUNED, VARIANTS, Preparation

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of the plan; `seconds` is its share when the whole run has nine minutes."""

    name: str
    seconds: float
    run: Callable[["Run"], None]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is timed: one token after `past`, at batch 1 and at `batch`, and a prompt of `prefill` tokens."""

    rounds: int
    past: int
    prefill: int
    batch: int


SIZES = Sizes(rounds=5, past=512, prefill=2048, batch=8)
SMOKE_SIZES = Sizes(rounds=1, past=8, prefill=16, batch=2)


@dataclass(kw_only=True)
class Run:
    """The state that stages share: models and folders, the deadline, and what could not be made."""

    device: str
    dtype: str
    preparation: Preparation
    prepared: Path | None
    workers: int
    model: Path | None
    data: Path | None
    work: Path
    record: Callable[[Record], None]
    sizes: Sizes
    end: float = 0.0
    """Deadline of the current stage, on the clock of time.monotonic."""
    failed: set[str] = field(default_factory=set)
    """What could not be prepared."""

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def process(self, arguments: Sequence[str], what: Record) -> None:
        """Run Python with these arguments, at most until the stage ends, and record what it prints."""
        command = [sys.executable, *arguments]
        if error := read_records(command, self.left, self.work, lambda found: self.record(what | found)):
            self.record(what | {"error": error})

    def job(self, runtimes: Sequence[str], cells: Sequence[Cell], *, pruned: bool, **changes: Any) -> Job:
        """A job of this run, dense or pruned, in PyTorch unless `changes` say otherwise."""
        job = Job(
            model=str(self.preparation.model),
            masks=str(self.preparation.masks) if pruned else None,
            artifact=None,
            reference=str(self.work / f"reference-{int(pruned)}.npy"),
            runtimes=tuple(runtimes),
            device=self.device,
            dtype=self.dtype,
            cells=tuple(cells),
            rounds=self.sizes.rounds,
            calls=10,
        )
        return replace(job, **changes)

    def measure(self, jobs: Sequence[tuple[Job, str | None]]) -> None:
        """Run jobs of gpu_cells.py, each with the name of its lowering, in one process.

        A CUDA error spoils a process: when one dies, the jobs after the one that killed it go on in another process.
        """
        pending = list(jobs)
        while pending:
            common = [self._common(job, lowering) for job, lowering in pending]

            def record(number: int, found: Record, common: Sequence[Record] = common) -> None:
                self.record(common[number] | found)

            begun = run_jobs([job for job, _ in pending], self.left, self.work, record)
            pending = pending[begun + 1 :] if self.left else []

    def _common(self, job: Job, lowering: str | None) -> Record:
        """The part that all records of a job have in common."""
        pruned = round(100 * PRUNED) if job.masks else 0
        return {"shape": self.preparation.shape, "pruned": pruned, "lowering": lowering}

    def measure_artifacts(self, names: Sequence[str], cells: Sequence[Cell]) -> None:
        """Measure the prepared artifacts in the order in which they are finished."""
        waiting = list(names)
        while waiting and self.left:
            ready = [name for name in waiting if self.preparation.find(name) is not None]
            waiting = [name for name in waiting if name not in ready and name not in self.failed]
            self.measure([(self._artifact_job(name, cells), name) for name in ready])
            if not ready:
                time.sleep(0.1)
        for name in waiting:
            self.record({"stage": "wait", "lowering": name, "error": "came too late"})

    def _artifact_job(self, name: str, cells: Sequence[Cell]) -> Job:
        changes: dict[str, Any] = {"artifact": str(self.preparation.find(name))}
        if VARIANTS[name].bits:  # the reference has other weights; the stage "right" judges int4
            changes["reference"] = None
        return self.job(ONNX_RUNTIME[self.device], cells, pruned=VARIANTS[name].pruned, **changes)

    @property
    def decoding(self) -> Cell:
        return Cell(phase="decode", batch=1, tokens=self.sizes.past)


def facts(run: Run) -> None:
    run.process([str(HERE / "gpu_facts.py"), run.device], {})


def right(run: Run) -> None:
    """Several workers on one GPU; one that dies is restarted after the artifact that killed it."""
    directory = run.prepared or run.work / "right"
    script = str(HERE / "gpu_right.py")
    if run.prepared is None:
        limit = [] if run.device == "cuda" else ["2"]
        run.process([script, "prepare", str(directory), *limit], {"stage": "prepare right"})
    for marker in directory.glob("*.begun"):
        marker.unlink()
    device = "target" if run.device == "cuda" else "cpu"

    def work(number: int) -> None:
        before = -1
        while run.left and len(done := list(directory.glob("*.begun"))) != before:
            before = len(done)
            run.process([script, "judge", str(directory), str(number), str(run.workers), device], {"stage": "right"})

    threads = [threading.Thread(target=work, args=[number]) for number in range(run.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def fast(run: Run) -> None:
    """Eager PyTorch first: its logits are the reference of the others."""
    while run.left and not run.preparation.masks.is_file():
        time.sleep(0.1)
    run.measure([(run.job([EAGER], [run.decoding], pruned=pruned), None) for pruned in (False, True)])
    run.measure_artifacts(
        ("dense", "inverse-gather", "canonical", "inverse-gather, align 1", "inverse-gather, align 64"), [run.decoding]
    )


def paper(run: Run) -> None:
    """A CUDA graph first; then torch.compile, which takes minutes for uneven widths: both models at once."""
    if run.device == "cuda":
        run.measure([(run.job([GRAPHED], [run.decoding], pruned=pruned), None) for pruned in (False, True)])
    turns = run.work / "turns"
    jobs = [run.job([COMPILED], [run.decoding], pruned=pruned, turns=str(turns)) for pruned in (False, True)]
    threads = [threading.Thread(target=run.measure, args=[[(job, None)]]) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def int4(run: Run) -> None:
    run.measure_artifacts(("int4 dense", "int4", "int4, align 64", "int4, align 1"), [run.decoding])


def batches(run: Run) -> None:
    cells = [
        Cell(phase="decode", batch=run.sizes.batch, tokens=run.sizes.past),
        Cell(phase="prefill", batch=1, tokens=run.sizes.prefill),
    ]
    run.measure([(run.job([EAGER], cells, pruned=pruned), None) for pruned in (False, True)])
    run.measure_artifacts(("dense", "inverse-gather"), cells)


def learning(run: Run) -> None:
    """Two runs on one GPU, which stop when their time is over and leave masks and checkpoints."""
    if run.model is None or run.data is None:
        run.record({"stage": "learning", "skipped": "needs --model DIR and --data TEXT"})
        return

    def learn(percent: int) -> None:
        masks = run.work / "learned" / f"masks-{percent}.safetensors"
        minutes = max(0.1, (run.left - 15) / 60)
        options = ["--pruning-ratio", str(percent / 100), "--data", str(run.data), "--minutes", f"{minutes:.2f}"]
        options += ["--batch-size", "8", "--sequence-length", "512", "--device", run.device, "--json", "--force"]
        options += ["--compile"] if run.device == "cuda" else []
        command = ["-m", "dispc", "learn", str(run.model), "-o", str(masks), *options]
        run.process(command, {"stage": "learning", "pruned": percent})

    threads = [threading.Thread(target=learn, args=[percent]) for percent in (30, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


STAGES = (
    Stage(name="facts", seconds=20, run=facts),
    Stage(name="right", seconds=100, run=right),
    Stage(name="fast", seconds=150, run=fast),
    Stage(name="paper", seconds=60, run=paper),
    Stage(name="int4", seconds=45, run=int4),
    Stage(name="batches", seconds=60, run=batches),
    Stage(name="learning", seconds=105, run=learning),
)
