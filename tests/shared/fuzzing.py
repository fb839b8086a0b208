"""Damaged inputs for every command: whatever is in a file, the answer is right or one line.

`python tests/shared/fuzzing.py --count 2000` damages one file per case (a bit, a value of its JSON, what kind of file
it is), runs a command that reads it in a forked process with limits, and counts what came of it. A case is a function
of seed and number: `--seed S --first N --count 1` repeats it, with what the command output.
"""

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from damage import Random, damage_bytes, damage_json, damage_kind

SECONDS, MEMORY, WRITTEN = 120, 16 * 2**30, 2**30
"""What a command may take: of time by the clock, of address space, and in a file that it writes."""
ALLOWED_CONTROLS = {"\n", "\t"}

LEARN = (
    *("learn", "model", "-r", "0.3", "--data", "text.txt", "-o", "new.safetensors"),
    *("--sequence-length", "16", "--batch-size", "1", "--steps", "1"),
)
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "compile": ("model", ("compile", "model", "-t", "onnx-cpu", "-o", "new")),
    "compile dense": ("model", ("compile", "model", "-t", "onnx", "-o", "new", "--dense", "--no-validate")),
    "inspect model": ("model", ("inspect", "model")),
    "learn random": ("model", ("learn", "model", "--method", "random", "-r", "0.3", "-o", "new.safetensors")),
    "learn": ("model", LEARN),
    "eval model": ("model", ("eval", "model", "--data", "text.txt", "--sequence-length", "32", "--max-windows", "1")),
    "validate reference": ("model", ("validate", "out", "-r", "model")),
    "import": ("model", ("import-masks", "model", "--model", "model", "-o", "new.safetensors")),
    "inspect masks": ("model/masks.safetensors", ("inspect", "model/masks.safetensors")),
    "inspect artifact": ("out", ("inspect", "out", "--ops")),
    "generate": ("out", ("generate", "out", "the sea", "--max-new-tokens", "2")),
    "validate": ("out", ("validate", "out", "-r", "model")),
    "eval artifact": ("out", ("eval", "out", "--data", "text.txt", "--sequence-length", "32", "--max-windows", "1")),
}
"""Command -> the file or folder whose files are damaged, and the words of the command."""


def furnish(place: Path) -> Path:
    """A model with everything that a model directory can hold, an artifact of it, and a text, in `place`."""
    import command
    import language
    import tiny

    from dispc.masks import Masks
    from dispc.model.checkpoint import Checkpoint

    model = tiny.make_model("llama", place / "model")
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    language.make_tokenizer(model, template)
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n\nA model.\n")
    (model / "LICENSE").write_text("MIT\n")
    config = Checkpoint(model).config
    Masks.random(config, 0.3, 1).save(model / "masks.safetensors", config)
    outcome = command.run("compile", model, "-t", "onnx-cpu", "-o", place / "out", "--no-validate")
    assert outcome.code == 0, outcome
    (place / "text.txt").write_text(language.make_text(60, 4))
    return place


@dataclass(frozen=True)
class Result:
    """What came of a case: `verdict` is `right`, `refused`, or what is wrong."""

    number: int
    command: str
    damage: str
    verdict: str
    output: str


def run_case(original: Path, scratch: Path, seed: int, number: int) -> Result:
    """Damage a copy of `original` in `scratch`, run a command there, and judge what it output."""
    rng = np.random.default_rng((seed, number))
    name = list(COMMANDS)[rng.integers(len(COMMANDS))]
    where, words = COMMANDS[name]
    place = scratch / "case"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(original, place)
    target = place / where
    files = sorted(path for path in target.iterdir() if path.is_file()) if target.is_dir() else [target]
    file = files[rng.integers(len(files))]
    ways: list[Callable[[Path, Random], str]] = [damage_bytes, damage_bytes, damage_kind]
    if file.suffix == ".json":
        ways += [damage_json] * 4
    damage = f"{file.relative_to(place)}: {ways[rng.integers(len(ways))](file, rng)}"
    before = listing(place)
    status, output = run_limited(words, place, scratch)
    left = {path for path in listing(place) ^ before if not path.startswith(("new", ".cache"))}
    return Result(number, name, damage, judge(name, status, output, left), output)


def listing(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


def run_limited(words: tuple[str, ...], place: Path, scratch: Path) -> tuple[int | None, str]:
    """The status of `dispc WORDS` in `place`, as os.waitstatus_to_exitcode has it (None: took too long), and what it
    printed."""
    log = scratch / "log"
    child = os.fork()
    if child == 0:
        try:
            os.chdir(place)
            streams = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(streams, stream)
            sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.environ["XDG_CACHE_HOME"] = str(place / ".cache")
            code = run_command(words)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            code = 99
        os._exit(code)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, log.read_text(errors="replace")


def run_command(words: tuple[str, ...]) -> int:
    from dispc.cli import app as cli

    sys.argv = ["dispc", *words]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


def judge(command: str, status: int | None, output: str, left: set[str]) -> str:
    """`right` (exit 0), `failed` (exit 1, of what judges), `refused` (exit 2 and one line), or what is wrong."""
    lines = output.splitlines()
    if status is None:
        return "hang"
    if status < 0 or status not in (0, 1, 2):
        return f"died ({status})"
    if any((ord(c) < 32 and c not in ALLOWED_CONTROLS) or 0x7F <= ord(c) < 0xA0 for c in output):
        return "escape"
    if left:
        return f"changed {sorted(left)[0]}"
    if status == 0:
        return "right"
    if status == 1:
        return "failed" if command in ("compile", "validate", "validate reference") else "exit 1"
    if "unexpected" in output and "please report" in output:
        return "unexpected"
    return "refused" if len(lines) == 1 and lines[0].startswith("error: ") else f"{len(lines)} lines"


FINE = ("right", "failed", "refused")


def fuzz(original: Path, scratch: Path, seed: int, numbers: range) -> Iterator[Result]:
    for number in numbers:
        yield run_case(original, scratch, seed, number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    options = parser.parse_args()
    prepare()
    counts: Counter[str] = Counter()
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="dispc-fuzz-") as folder:
        original = furnish(Path(folder) / "original")
        for result in fuzz(original, Path(folder), options.seed, range(options.first, options.first + options.count)):
            counts[result.verdict.split(" ")[0] if result.verdict in FINE else result.verdict] += 1
            if result.verdict not in FINE or options.count == 1:
                last = (result.output.strip().splitlines() or [""])[-1]
                print(f"{result.number}: {result.verdict}: {result.command}: {result.damage}", flush=True)
                print(f"    {last!r:.300}", flush=True)
            if time.monotonic() > end:
                break
    print(f"{counts.total()} cases with seed {options.seed}: {dict(counts.most_common())}")
    return int(any(verdict not in FINE for verdict in counts))


def prepare() -> None:
    """Load what every command needs, once for all forks; one thread each, since threads do not survive a fork."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    import onnxruntime  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import dispc.compiler
    import dispc.evaluate.evaluate
    import dispc.learn.trainer
    import dispc.validate.judge  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
