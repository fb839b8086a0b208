"""Learn masks at several ratios and recover each, all ratios at once, on one GPU within a time limit.

    .venv/bin/python benchmarks/learn_and_recover.py --model MODEL --text TEXT --minutes 6 --out OUT
    .venv/bin/python benchmarks/learn_and_recover.py --model MODEL --text TEXT --smoke --out OUT   # CPU, two steps

TEXT holds train.jsonl (learning_text.py), held-out.jsonl (dense_answers.py) and wiki.test.raw, and may hold cache/ with
tokenised texts. Stages: every ratio learns in a process of its own; each is recovered twice, by adapters of rank 8 and
by all weights of the blocks; perplexities are measured before and after, on the test text and on held-out answers. OUT
gets small files only and is rewritten after each stage, so that an interrupted run keeps its results.

    report.json          seconds, tokens per second, perplexities, also during learning
    learned.tar.gz        masks, metrics and logs
    adapter-RATIO.tar.gz  the adapters, as peft loads them
"""

import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional

from dispc.demo.model import shipped_masks
from dispc.learn.budget import block_budget, final_sets
from dispc.learn.hypernetwork import HyperNetwork, Layout
from dispc.learn.objective import GatedModel
from dispc.masks import Masks, set_width
from dispc.model.checkpoint import Checkpoint
from dispc.model.text import load_tokens, windows
from dispc.reference.masked import load_reference
from dispc.support.files import whole, write_json

LEARN = ("--batch-size", 8, "--sequence-length", 512, "--learning-rate", 2e-3, "--decay", "--checkpoint-every", 100)
RECOVER = (
    *("--batch-size", 4, "--accumulate", 2, "--sequence-length", 512, "--loss", "both"),
    *("--evaluate-every", 25, "--checkpoint-every", 200, "--patience", 1000),
)
RECOVERIES: dict[str, tuple[Any, ...]] = {
    "lora": ("--lora", 8, "--learning-rate", 2e-3),
    "full": ("--learning-rate", 2e-4),
}
OFFSETS = {20: 5, 30: 5, 40: 4, 50: 4}
"""Decision 0010: where more is pruned, more gates must close."""
SMOKE = ("--batch-size", 2, "--accumulate", 1, "--sequence-length", 32, "--steps", 2, "--evaluate-every", 1)
ENDLESS = ("--steps", 10**6)
LEARN_SHARE, RECOVER_SHARE = 0.40, 0.36
"""Shares of the minutes; the rest is loading, judging and packing."""
SPARE = 40.0
"""Additional seconds of a stage, for loading and writing."""


@dataclass
class Job:
    """One command of dispc: its arguments, what it makes, and its log."""

    name: str
    arguments: list[Any]
    product: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it resumes what an earlier try has left."""
        with open(self.log, "ab") as log:
            command = [sys.executable, "-m", "dispc", *map(str, self.arguments), "--resume"]
            environment = os.environ | {"OMP_NUM_THREADS": "2"}  # many processes share the cores
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)


@dataclass
class Run:
    """Folders, limits and the report of one run."""

    model: Path
    text: Path
    out: Path
    work: Path
    ratios: list[int]
    minutes: float
    device: str
    smoke: bool
    started: float = field(default_factory=time.perf_counter)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def note(self, key: str, value: Any) -> None:
        """Add a figure to the report and write it."""
        self.report[key] = value
        self.report["seconds"] = round(self.seconds, 1)
        write_json(self.out / "report.json", self.report)
        print(f"{self.seconds:6.1f} s  {key}: {value}", flush=True)

    def masks(self, ratio: int) -> Path:
        return self.work / f"masks-{ratio}.safetensors"

    def learn_jobs(self) -> list[Job]:
        found = []
        for ratio in self.ratios:
            arguments = ["learn", self.model, "--data", self.text / "train.jsonl", "-o", self.masks(ratio)]
            arguments += ["-r", ratio / 100, "--offset", OFFSETS.get(ratio, 4), "--device", self.device, *LEARN]
            arguments += self.length(LEARN_SHARE, SMOKE[:2] + SMOKE[4:8])
            found.append(Job(f"learn-{ratio}", arguments, self.masks(ratio), self.work / f"learn-{ratio}.log"))
        return found

    def recover_jobs(self) -> list[Job]:
        found = []
        for ratio in self.ratios:
            for kind, options in RECOVERIES.items():
                name = f"{kind}-{ratio}"
                arguments = ["recover", self.model, "--masks", self.masks(ratio), "--data", self.text / "train.jsonl"]
                arguments += ["-o", self.work / name, "--device", self.device, *RECOVER, *options]
                arguments += self.length(RECOVER_SHARE, SMOKE)
                found.append(Job(name, arguments, self.work / name, self.work / f"{name}.log"))
        return found

    def length(self, share: float, smoke: tuple[Any, ...]) -> tuple[Any, ...]:
        return smoke if self.smoke else (*ENDLESS, "--minutes", round(share * self.minutes, 3))


def start(jobs: list[Job]) -> None:
    """Start all jobs at once, apart from those that an earlier run has finished."""
    for job in jobs:
        if not job.product.exists():
            job.start()


def finish(run: Run, jobs: list[Job], seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait `seconds` for the jobs; those that still run are asked to save and stop, then killed."""
    waiting = [job for job in jobs if job.process is not None]
    until = time.perf_counter() + seconds
    while time.perf_counter() < until and any(job.process and job.process.poll() is None for job in waiting):
        time.sleep(0.5)
        meanwhile()
    for job in waiting:
        assert job.process is not None
        try:
            job.process.wait(max(0.0, until - time.perf_counter()))
        except subprocess.TimeoutExpired:
            job.process.send_signal(signal.SIGTERM)
            try:
                job.process.wait(10.0)
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
        if job.process.returncode:
            end = job.log.read_text(errors="replace").strip().splitlines()[-1:]
            run.note(f"{job.name} failed", f"exit code {job.process.returncode}: {' '.join(end)}")


@torch.no_grad()
def perplexities(run: Run, model: Any, *, quick: bool = False) -> dict[str, float]:
    """Perplexities on the test text in windows of 2,048 (not if `quick`), on 16 of 1,024, and on held-out answers."""
    found = {}
    for name, text, length, count in (
        ("wiki.test", "wiki.test.raw", 2048, None),
        ("wiki.test, 16 of 1024", "wiki.test.raw", 1024, 16),
        ("answers", "held-out.jsonl", 1024, None),
    ):
        if quick and length == 2048:
            continue
        length, count = (64, 2) if run.smoke else (length, count)
        rows = windows(load_tokens(str(run.text / text), run.model), length, text)[:count]
        total = torch.zeros((), dtype=torch.float64, device=run.device)
        for row in torch.from_numpy(rows).long().to(run.device).tensor_split(-(-len(rows) // 4)):
            logits = model(input_ids=row, use_cache=False).logits[:, :-1].float()
            total += functional.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum").double()
        found[name] = round(math.exp(float(total) / (len(rows) * (length - 1))), 3)
    return found


def judge(run: Run, key: str, directory: Path, masks: Path | None) -> None:
    """Note the perplexities of a model directory, under masks or as it is."""
    if key in run.report:
        return
    model = load_reference(Checkpoint(directory), Masks.load(masks) if masks else None).to(run.device)
    run.note(key, perplexities(run, model))


class Curve:
    """Perplexity against tokens during learning, of the sets that each checkpoint would give.

    The learning rate falls during a run, so that a point of the curve is worse than a run that was planned to end
    there.
    """

    def __init__(self, run: Run) -> None:
        self.run, checkpoint = run, Checkpoint(run.model)
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.layout = Layout.make(checkpoint.config)
        model = load_reference(checkpoint, None).to(run.device)
        self.gated = GatedModel(model, checkpoint.config, "full")
        self.written = dict.fromkeys(run.ratios, 0.0)

    def look(self) -> None:
        """Judge the new checkpoints."""
        for ratio in self.run.ratios:
            folder = self.run.masks(ratio).with_suffix(".learn")
            try:
                written = (folder / "checkpoint.pt").stat().st_mtime
                if written == self.written[ratio]:
                    continue
                state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
                options = json.loads((folder / "options.json").read_text())
            except (OSError, RuntimeError, ValueError):  # there is none yet
                continue
            self.written[ratio] = written
            tokens = state["step"] * options["batch_size"] * options["sequence_length"]
            points = self.run.report.get(f"curve {ratio}", [])
            self.run.note(f"curve {ratio}", [*points, {"tokens": tokens} | self.judge(state["source"], ratio)])

    @torch.no_grad()
    def judge(self, source: dict[str, torch.Tensor], ratio: int) -> dict[str, float]:
        """Perplexities of the sets that a hypernetwork's state gives."""
        network = HyperNetwork(self.layout.widths)
        network.load_state_dict(source)
        latents = self.layout.expand(network()).float().numpy()
        masks = final_sets(latents, self.config, block_budget(self.checkpoint, ratio / 100, "blocks"))
        gates = []
        for block in masks.blocks:
            for name, indices in block.sets().items():
                gate = torch.zeros(set_width(name, masks.hidden_size, masks.intermediate_size))
                gate[torch.from_numpy(indices)] = 1.0
                gates.append(gate.to(self.run.device))
        self.gated.pieces = gates
        return perplexities(self.run, self.gated.model, quick=True)


def pack(path: Path, files: list[Path], root: Path) -> None:
    """One compressed archive of those files that exist, with names relative to `root`."""
    with whole(path) as partial, tarfile.open(partial, "w:gz") as archive:
        for file in files:
            if file.exists():
                archive.add(file, str(file.relative_to(root)))


def pack_all(run: Run) -> None:
    """Everything small that exists by now."""
    folders = [*run.work.glob("*.learn"), *run.work.glob("*.recover")]
    small = [file for folder in folders for file in (folder / "metrics.jsonl", folder / "options.json")]
    small += [*run.work.glob("*.log"), *run.work.glob("masks-*.safetensors"), *run.work.glob("*/recovery.json")]
    pack(run.out / "learned.tar.gz", sorted(small), run.work)
    for ratio in run.ratios:
        adapter = run.work / f"lora-{ratio}" / "adapter"
        if adapter.exists():
            pack(run.out / f"adapter-{ratio}.tar.gz", [adapter], adapter.parent)


def speeds(run: Run, jobs: list[Job]) -> None:
    """Note steps and tokens a second of each job, from its metrics."""
    for job in jobs:
        folders = [*run.work.glob(f"{job.product.name.removesuffix('.safetensors')}.*/metrics.jsonl")]
        records = [json.loads(line) for file in folders for line in file.read_text().splitlines()]
        rates = sorted(record["tokens_per_second"] for record in records if "tokens_per_second" in record)
        if rates:
            run.note(f"{job.name} speed", {"steps": len(rates), "median tokens/s": round(rates[len(rates) // 2])})


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face model directory.")],
    text: Annotated[Path, typer.Option(help="Directory with the texts.")],
    out: Annotated[Path, typer.Option(help="Where the small results go.")],
    minutes: Annotated[float, typer.Option(help="All that may be used.")] = 6.0,
    work: Annotated[Path | None, typer.Option(help="Where runs go on.", show_default="OUT/../work")] = None,
    ratios: Annotated[str, typer.Option(help="Per cent, by commas.")] = "20,30,40,50",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two steps of everything, on short texts.")] = False,
) -> None:
    """Run all stages; a second run in the same work folder resumes the first."""
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    work = work or out.resolve().parent / "work"
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    if (text / "cache").is_dir():
        os.environ["XDG_CACHE_HOME"] = str((text / "cache").resolve())
    torch.set_float32_matmul_precision("high")
    run = Run(model, text, out, work, [int(one) for one in ratios.split(",")], minutes, place, smoke)
    if place == "cuda":
        run.note("device", f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    learning, recovering = run.learn_jobs(), run.recover_jobs()
    try:
        start(learning)
        judge(run, "dense", model, None)
        curve = Curve(run)
        finish(run, learning, 600.0 if smoke else 60.0 * LEARN_SHARE * minutes + SPARE, curve.look)
        del curve
        speeds(run, learning)
        for ratio in run.ratios:
            if not run.masks(ratio).exists():
                run.masks(ratio).write_bytes(shipped_masks(ratio / 100).read_bytes())
                run.note(f"masks {ratio}", "not learned: those that ship are recovered")
        pack_all(run)
        start(recovering)
        finish(run, recovering, 600.0 if smoke else 60.0 * RECOVER_SHARE * minutes + SPARE)
        pack_all(run)
        speeds(run, recovering)
        for ratio in run.ratios:
            judge(run, f"pruned {ratio}", model, run.masks(ratio))
            for kind in RECOVERIES:
                if run.work.joinpath(f"{kind}-{ratio}").exists():
                    judge(run, f"{kind} {ratio}", run.work / f"{kind}-{ratio}", None)
    finally:
        for job in (*learning, *recovering):
            if job.process is not None and job.process.poll() is None:
                job.process.kill()
        pack_all(run)
        run.note("packed", {file.name: file.stat().st_size for file in sorted(out.iterdir())})


if __name__ == "__main__":
    typer.run(main)
