"""Everything that only a GPU can show, in one command that survives being cut off: the most important first.

    .venv/bin/python benchmarks/gpu_minutes.py --minutes 9 --json benchmarks/results/gpu-minutes.json
    .venv/bin/python benchmarks/gpu_minutes.py --smoke            # the same on the CPU, with tiny models

Stages run in this order, each in processes of its own with a time limit; time that a stage leaves goes to the next:

1. facts: GPU, driver, versions, `dispc doctor`, bandwidth of a large copy
2. right: tiny artifacts of every family through all of `dispc validate`'s checks (gpu_right.py; --prepared DIR uses
   those that `gpu_right.py prepare DIR` made elsewhere)
3. fast: the LLaMA-2-7B shape at batch 1, dense and half pruned with learned-like widths, with and without CUDA graph
4. paper: PyTorch's Algorithm 1 through torch.compile, the same cells
5. int4: the same shape with four-bit weights
6. batches: batch 8, and a prefill of 2,048 tokens
7. learning, with --model DIR and --data TEXT: the paper's recipe in bfloat16 at 30 and 50 %, side by side

The checkpoint and its artifacts are made in the background from the start (gpu_prepare.py). After every cell the JSON
file and a Markdown table beside it are written anew. What fails leaves its last lines there, and the next thing runs.
docs/performance.md says what each stage assumes of a GPU.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from common import WORK, console, remove, write_result
from gpu import Found, judge, table_row, with_speedups
from gpu_cells import COMPILED, EAGER, ONNX_RUNTIME, Cell, Job
from gpu_prepare import PRUNED, VARIANTS, Preparation, as_argument
from machine import environment

HERE = Path(__file__).resolve().parent
LAST_LINES = 6
"""How much of a failed process's stderr is kept."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of the plan: its name, its seconds when the whole run has nine minutes, and what it runs."""

    name: str
    seconds: float
    run: Callable[["Run"], None]


@dataclass(kw_only=True)
class Run:
    """What stages share: where things are, when they must end, and what was found."""

    device: str
    dtype: str
    preparation: Preparation
    prepared: Path | None
    workers: int
    model: Path | None
    data: Path | None
    work: Path
    record: Callable[[Found], None]
    rounds: int
    past: int
    prefill: int
    batch: int
    end: float = 0.0
    """When the current stage has to be over, on time.monotonic's clock."""
    failed: set[str] = field(default_factory=set)
    """What could not be prepared."""

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def process(self, arguments: Sequence[str], what: Found, planned: Sequence[Found] = ()) -> None:
        """Run a Python script of this folder until the stage ends; every line of JSON that it prints is recorded.

        Planned lines that it does not print become errors with the end of what it said.
        """
        run_lines([sys.executable, *arguments], self.left, self.record, what, planned, self.work)

    def artifact(self, name: str) -> Path | None:
        """The prepared artifact, waited for; None when it failed or the stage ends first."""
        while self.left and name not in self.failed:
            if (path := self.preparation.find(name)) is not None:
                return path
            time.sleep(0.1)
        self.record({"stage": "wait", "lowering": name, "error": "was not made" if self.left else "came too late"})
        return None

    def job(self, runtimes: Sequence[str], cells: Sequence[Cell], *, pruned: bool, **changes: Any) -> Job:
        masks, reference = str(self.preparation.masks), self.work / f"reference-{int(pruned)}.npy"
        options: dict[str, Any] = {"masks": masks if pruned else None, "artifact": None, "reference": str(reference)}
        return Job(
            model=str(self.preparation.model), runtimes=tuple(runtimes), device=self.device, dtype=self.dtype,
            cells=tuple(cells), rounds=self.rounds, calls=10, **options | changes,
        )  # fmt: skip

    def measure(self, job: Job, lowering: str | None) -> None:
        """Run a job of gpu_cells.py."""
        pruned = round(100 * PRUNED) if job.masks else 0
        where: Found = {"shape": self.preparation.shape, "pruned": pruned, "lowering": lowering}
        planned = [{"runtime": runtime} | asdict(cell) for runtime, cell in job.planned()]
        self.process([str(HERE / "gpu_cells.py"), json.dumps(asdict(job))], where, planned)

    def measure_artifacts(self, names: Sequence[str], cells: Sequence[Cell]) -> None:
        for name in names:
            variant, path = VARIANTS[name], self.artifact(name)
            if path is not None:
                changes: dict[str, Any] = {"artifact": str(path)} | ({"reference": None} if variant.bits else {})
                runtimes = ONNX_RUNTIME[self.device]
                self.measure(self.job(runtimes, cells, pruned=variant.pruned, **changes), name)

    @property
    def decoding(self) -> Cell:
        return Cell(phase="decode", batch=1, tokens=self.past)


def run_lines(
    command: Sequence[str], seconds: float, record: Callable[[Found], None], what: Found,
    planned: Sequence[Found], work: Path,
) -> None:  # fmt: skip
    """Run a command for at most so many seconds and record each line of JSON that it prints, with `what` added.

    It gets a process group of its own, which is killed as a whole when the time is up.
    """
    if seconds <= 0:
        record(what | {"error": "no time was left for it"})
        return
    log = work / f"stderr-{threading.get_ident()}.txt"
    missing = list(planned)
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as process,
    ):
        timer = threading.Timer(seconds, _kill_group, [process])
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            found = _parsed(line)
            if found is not None:
                record(what | found)
                missing = [cell for cell in missing if not cell.items() <= found.items()]
        code = process.wait()
        timed_out = timer.finished.is_set()
        timer.cancel()
    if code or missing:
        lines = log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:] or ["nothing on stderr"]
        ended = f"stopped after {seconds:.0f} s" if timed_out else f"ended with {code}"
        error = f"the process {ended}: {' | '.join(line.strip()[:200] for line in lines)}"
        for cell in missing or [{}]:
            record(what | cell | {"error": error})


def _parsed(line: str) -> Found | None:
    """A line of JSON; None for what libraries print."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _kill_group(process: "subprocess.Popen[str]") -> None:
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return


def facts(run: Run) -> None:
    run.process([str(HERE / "gpu_facts.py"), run.device], {})


def right(run: Run) -> None:
    """Several workers on one GPU; one that dies is started again behind the artifact that killed it."""
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
    """Eager PyTorch first: its logits are what the others are held to."""
    while run.left and not run.preparation.masks.is_file():
        time.sleep(0.1)
    for pruned in (False, True):
        run.measure(run.job([EAGER], [run.decoding], pruned=pruned), None)
    run.measure_artifacts(
        ("dense", "inverse-gather", "canonical", "inverse-gather, align 1", "inverse-gather, align 64"), [run.decoding]
    )


def paper(run: Run) -> None:
    """Both compile at the same time, on the CPU; what is timed is timed alone."""
    turns = run.work / "turns"
    jobs = [run.job([COMPILED], [run.decoding], pruned=pruned, turns=str(turns)) for pruned in (False, True)]
    threads = [threading.Thread(target=run.measure, args=[job, None]) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def int4(run: Run) -> None:
    run.measure_artifacts(("int4 dense", "int4", "int4, align 64", "int4, align 1"), [run.decoding])


def batches(run: Run) -> None:
    cells = [
        Cell(phase="decode", batch=run.batch, tokens=run.past),
        Cell(phase="prefill", batch=1, tokens=run.prefill),
    ]
    for pruned in (False, True):
        run.measure(run.job([EAGER], cells, pruned=pruned), None)
    run.measure_artifacts(("dense", "inverse-gather"), cells)


def learning(run: Run) -> None:
    """Two runs on one GPU; they stop when their minutes are over, and leave masks and checkpoints."""
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


@contextmanager
def preparing(run: Run) -> Iterator[None]:
    """Make checkpoint and artifacts in the background; what is still being made at the end is given up."""

    def note(found: Found) -> None:
        if "error" in found and "prepared" in found:
            run.failed.add(found["prepared"])
        run.record(found)

    command = [sys.executable, str(HERE / "gpu_prepare.py"), as_argument(run.preparation)]
    log = (run.work / "prepare.txt").open("w")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if (found := _parsed(line)) is not None:
                note({"stage": "prepare"} | found)
        if process.wait() > 0:
            run.failed.update(run.preparation.variants)
            note({"stage": "prepare", "error": f"ended with {process.returncode}: see {run.work / 'prepare.txt'}"})

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield
    finally:
        _kill_group(process)
        reader.join()
        log.close()


def tables(result: Found) -> str:
    """The result as Markdown."""
    rate = result["device"].get("copy_gb_per_second", float("nan"))
    lines = [f"# {result['device'].get('name')}, {result['dtype']}", ""]
    judged = [row for row in result["rows"] if row.get("stage") == "right" and "artifact" in row]
    passed = sum(row["passed"] for row in judged)
    lines += [f"Right: {passed} of {len(judged)} artifacts pass every check on the device.", ""]
    lines += [f"- FAILED {row['artifact']}: {'; '.join(row['failed'])[:300]}" for row in judged if not row["passed"]]
    columns = ("", "phase", "batch", "tokens", "median ms", "max ms", "tokens/s", "speed-up", "GB/s", "of copy",
               "indexing")  # fmt: skip
    lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(table_row(cell, rate))} |" for cell in with_speedups(result["cells"])]
    lines += ["", *(f"- {'reached' if met else 'NOT reached'}: {goal}" for goal, met in result["goals"].items())]
    lines += ["", "| stage | seconds | limit |", "|---|---|---|"]
    lines += [f"| {stage['name']} | {stage['seconds']} | {stage['limit']} |" for stage in result["stages"]]
    return "\n".join(lines) + "\n"


def main(
    minutes: Annotated[float, typer.Option(help="For everything; stages share it as in their table.")] = 9.0,
    stages: Annotated[str, typer.Option(help="Which to run.")] = ",".join(stage.name for stage in STAGES),
    prepared: Annotated[Path | None, typer.Option(help="Artifacts of `gpu_right.py prepare`.")] = None,
    model: Annotated[Path | None, typer.Option(help="Real weights, for learning.")] = None,
    data: Annotated[Path | None, typer.Option(help="Text, for learning.")] = None,
    folders: Annotated[str, typer.Option(help="Folders for the 7B shape: 70 GB together.")] = str(WORK / "gpu"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None,
    smoke: Annotated[bool, typer.Option(help="Tiny models on the CPU: does it run?")] = False,
) -> None:
    """Parity, speed and learning on a GPU within a few minutes."""
    if unknown := set(stages.split(",")) - {stage.name for stage in STAGES}:
        raise typer.BadParameter(f"unknown stage {min(unknown)}")
    work = Path(folders.split(",")[0])
    remove(work)
    work.mkdir(parents=True)
    preparation = Preparation(
        shape="tiny" if smoke else "llama-2-7b", target="onnx-cpu" if smoke else "onnx-cuda",
        folders=tuple(folders.split(",")), variants=tuple(VARIANTS), workers=2 if smoke else 6,
    )  # fmt: skip
    result: Found = {"benchmark": "gpu_minutes", "smoke": smoke, "environment": environment(), "device": {}}
    result |= {"dtype": "float32" if smoke else "float16", "cells": [], "rows": [], "stages": [], "goals": {}}
    lock = threading.Lock()

    def record(found: Found) -> None:
        with lock:
            if "device" in found:
                result["device"] = found["device"]
            result["cells" if "runtime" in found else "rows"].append(found)
            rate = result["device"].get("copy_gb_per_second", float("nan"))
            result["goals"] = {} if smoke else judge(with_speedups(result["cells"]), rate)
            console.print(json.dumps(found)[:400], highlight=False, soft_wrap=True, markup=False)
            write_result(json_file, result)
            if json_file is not None:
                json_file.with_suffix(".md").write_text(tables(result), encoding="utf-8")

    run = Run(
        device="cpu" if smoke else "cuda", dtype=result["dtype"], preparation=preparation, prepared=prepared,
        workers=2 if smoke else 6, model=model, data=data, work=work, record=record, rounds=1 if smoke else 5,
        past=8 if smoke else 512, prefill=16 if smoke else 2048, batch=2 if smoke else 8,
    )  # fmt: skip
    chosen = [stage for stage in STAGES if stage.name in stages.split(",")]
    scale = 60 * minutes / sum(stage.seconds for stage in chosen)
    run.end = time.monotonic()
    with preparing(run):
        for stage in chosen:
            run.end += stage.seconds * scale
            started, limit = time.monotonic(), run.left
            console.print(f"== {stage.name}, at most {limit:.0f} s", highlight=False)
            stage.run(run)
            result["stages"].append(
                {"name": stage.name, "seconds": round(time.monotonic() - started, 1), "limit": round(limit, 1)}
            )
            record({"stage": stage.name, "ended": True})
    console.print(tables(result), highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    typer.run(main)
