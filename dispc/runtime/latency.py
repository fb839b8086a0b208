"""How fast an artifact is, beside a dense one: measured in a process of its own, with nothing else in its memory.

`python -m dispc.runtime.latency` reads a `Request` as JSON from standard input and prints `Latency` as JSON. Inputs and
outputs stay on the device (IO binding). The two artifacts are timed alternately: a machine that slows down slows both.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dispc.lowerings import READS, WRITES
from dispc.runtime.bound import BoundDecoder
from dispc.runtime.profile import OperatorTime, bytes_read, operator_times, shares_buffer
from dispc.runtime.providers import PROVIDERS, Provider
from dispc.runtime.session import Artifact
from dispc.runtime.timing import alternate
from dispc.support.arrays import Tokens
from dispc.support.dtypes import BY_ORT
from dispc.support.errors import ArtifactError, DispcError
from dispc.support.typed_json import OPTIONAL, from_json, to_json

SELECTING = READS | WRITES - {"Add"}
"""The operators that gather and scatter."""


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """What to time: every batch with every prompt length (time to first token) and every past length (one token).

    `threads` 0 leaves their number to ONNX Runtime. `rounds` counts timed runs after `warmup` others.
    """

    batches: tuple[int, ...] = (1,)
    prompts: tuple[int, ...] = (128,)
    pasts: tuple[int, ...] = (128,)
    rounds: int = 20
    warmup: int = 3
    threads: int = 0

    def __post_init__(self) -> None:
        if min(*self.batches, *self.prompts, *self.pasts, self.rounds) < 1 or min(self.threads, self.warmup) < 0:
            raise ArtifactError("latency: batches, prompts, pasts and rounds are 1 or more, threads 0 or more")

    def require_room(self, path: Path, positions: int) -> None:
        """Raise ArtifactError when the artifact of `path` has not the `positions` that are to be timed."""
        longest = max(*self.prompts, *self.pasts)
        if longest >= positions:
            raise ArtifactError(f"{path}: latency after {longest} tokens, the model takes {positions}")


@dataclass(frozen=True, kw_only=True)
class LatencyRow:
    """One case of one artifact (`artifact` or `dense`): percentiles in milliseconds.

    A step has the bytes that it reads, per second, and as a share of what a copy moves.
    """

    artifact: str
    name: str
    p50: float
    p90: float
    p99: float
    tokens_per_second: float
    cuda_graph: bool
    bytes_per_token: int | None = field(default=None, metadata=OPTIONAL)
    bytes_per_second: float | None = field(default=None, metadata=OPTIONAL)
    share_of_copy: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Everything that was timed, and on what.

    `speedup` is that over the dense artifact, by row name; `operators` are the times by type while decoding;
    `peak_bytes` is the most memory that the process had, before the dense artifact was loaded.
    """

    rows: tuple[LatencyRow, ...]
    speedup: Mapping[str, float]
    copy_bytes_per_second: float
    peak_bytes: int | None
    operators: tuple[OperatorTime, ...]
    gather_scatter_share: float
    provider: str
    threads: int | None
    threads_chosen_by: str
    rounds: int
    warmup: int
    dense: str | None


def measure_latency(artifact: Path, dense: Path | None, options: LatencyOptions, provider: Provider) -> Latency:
    """Run `measure` in a process of its own.

    Raises:
        ArtifactError: with the last line that the process wrote to standard error.
    """
    request = Request(str(artifact), str(dense) if dense else None, provider.name, options)
    command = [sys.executable, "-P", "-m", "dispc.runtime.latency"]  # -P: nothing of the folder that the user is in
    done = subprocess.run(command, input=json.dumps(to_json(request)), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ArtifactError(f"{artifact}: latency could not be measured: {reason}")
    return from_json(Latency, json.loads(done.stdout), f"{artifact}: latency", ArtifactError)


def measure(artifact: Path, dense: Path | None, options: LatencyOptions, provider: Provider) -> Latency:
    """A row for each artifact, batch and length; with CUDA graphs too where there is CUDA."""
    provider.preload()
    names = {"artifact": artifact} | ({"dense": dense} if dense else {})
    rows: list[LatencyRow] = []
    loaded: dict[str, list[TimedArtifact]] = {}
    peak: int | None = None
    for name, path in names.items():
        loaded[name] = [TimedArtifact(path, provider, options.threads, graph) for graph in _graphs(path, provider)]
        options.require_room(path, loaded[name][0].artifact.positions)
        for batch in options.batches:  # once, so that the peak is known before the next artifact is loaded
            for session in loaded[name]:
                session.prefill(batch, max(options.prompts))()
                session.step(batch, max(options.pasts))()
        if name == "artifact":  # that of the dense one would have this one in it
            peak = provider.peak_bytes()
    for batch in options.batches:
        for kind, lengths in (("first token", options.prompts), ("one token", options.pasts)):
            for length in lengths:
                rows += time_case(loaded, kind, batch, length, options)
    copy = provider.copy_speed(options.threads)
    operators = operator_times(
        artifact,
        provider,
        threads=options.threads,
        batch=max(options.batches),
        past=max(options.pasts),
        rounds=options.rounds,
    )
    bases = {row.name: row.p50 for row in rows if row.artifact == "dense"}
    return Latency(
        rows=tuple(
            row if row.bytes_per_second is None else replace(row, share_of_copy=row.bytes_per_second / copy)
            for row in rows
        ),
        speedup={
            row.name: bases[row.name] / row.p50 for row in rows if row.artifact == "artifact" and row.name in bases
        },
        copy_bytes_per_second=copy,
        peak_bytes=peak,
        operators=tuple(operators),
        gather_scatter_share=sum(entry.share for entry in operators if entry.operator in SELECTING),
        provider=provider.name,
        threads=options.threads or os.cpu_count(),
        threads_chosen_by="option" if options.threads else "ONNX Runtime",
        rounds=options.rounds,
        warmup=options.warmup,
        dense=str(dense) if dense else None,
    )


class TimedArtifact:
    """An artifact loaded for timing, and what one call of it reads from memory."""

    def __init__(self, path: Path, provider: Provider, threads: int, graph: bool) -> None:
        options = dict(provider.graph_options or {}) if graph else {}
        self.artifact = Artifact(path, threads, provider=provider, provider_options=options)
        self.graph = graph
        self.shared = shares_buffer(self.artifact)
        self.weights = bytes_read(path / "model.onnx") * (2 if self.artifact.widened else 1)
        self.rng = np.random.default_rng(0)
        logits = next(value for value in self.artifact.session.get_outputs() if value.name == "logits")
        self.vocabulary = int(logits.shape[-1])

    def prefill(self, batch: int, length: int) -> Callable[[], None]:
        """A call that runs a prompt of `length` tokens on an empty cache."""
        decoder = self._decoder(batch, length)
        decoder.prepare(self._tokens(batch, length))
        return decoder.run

    def step(self, batch: int, past: int) -> Callable[[], None]:
        """A call that runs one token after `past` others, always the same one."""
        decoder = self._decoder(batch, past + 1)
        decoder.feed(self._tokens(batch, past))
        decoder.prepare(self._tokens(batch, 1))
        return decoder.run

    def step_bytes(self, batch: int, past: int) -> int:
        """Weights once, and the caches of `past` positions."""
        caches = [self.artifact.runner.inputs[name] for name in self.artifact.runner.caches]
        position = sum(value.shape[1] * value.shape[3] * BY_ORT[value.type].bytes for value in caches)
        return int(self.weights + batch * past * position)

    def _decoder(self, batch: int, capacity: int) -> BoundDecoder:
        room = min(self.artifact.positions, capacity)
        return BoundDecoder(self.artifact, batch=batch, capacity=room, shared=self.shared, graph=self.graph)

    def _tokens(self, batch: int, length: int) -> Tokens:
        return self.rng.integers(0, self.vocabulary, (batch, length))


def _graphs(path: Path, provider: Provider) -> tuple[bool, ...]:
    """Capturing graphs off, and on where provider and artifact can."""
    if provider.graph_options is None:
        return (False,)
    from dispc.manifest import read_manifest

    return (False, True) if read_manifest(path).shares_buffer else (False,)


def time_case(
    loaded: Mapping[str, list[TimedArtifact]], kind: str, batch: int, length: int, options: LatencyOptions
) -> list[LatencyRow]:
    """Time one case (`first token` of a prompt, or `one token` after others) on all sessions, alternately."""
    cases: list[tuple[str, str, TimedArtifact, Callable[[], None]]] = []
    for name, sessions in loaded.items():
        for session in sessions:
            if kind == "first token" and session.graph:
                continue  # a prefill is never captured
            title = f"{kind}, batch {batch}, {'prompt' if kind == 'first token' else 'past'} {length}"
            title += ", CUDA graph" if session.graph else ""
            case = session.prefill(batch, length) if kind == "first token" else session.step(batch, length)
            cases.append((name, title, session, case))
    runs = {index: call for index, (*_, call) in enumerate(cases)}
    times = alternate(runs, options.rounds, warmup_rounds=options.warmup, warmup_calls=0)
    rows = []
    for index, (name, title, session, _) in enumerate(cases):
        p50, p90, p99 = np.percentile(times[index], (50, 90, 99))
        tokens = batch * (length if kind == "first token" else 1)
        read = session.step_bytes(batch, length) if kind == "one token" else None
        rows.append(
            LatencyRow(
                artifact=name,
                name=title,
                p50=float(p50),
                p90=float(p90),
                p99=float(p99),
                tokens_per_second=1000 * tokens / float(p50),
                cuda_graph=session.graph,
                bytes_per_token=read,
                bytes_per_second=None if read is None else 1000 * read / float(p50),
            )
        )
    return rows


@dataclass(frozen=True)
class Request:
    """What the process of its own is given: paths, the provider's name, and what to time."""

    artifact: str
    dense: str | None
    provider: str
    options: LatencyOptions


def main() -> None:
    try:
        request = from_json(Request, json.load(sys.stdin), "the request", ArtifactError)
        dense = Path(request.dense) if request.dense else None
        latency = measure(Path(request.artifact), dense, request.options, PROVIDERS[request.provider])
    except DispcError as error:
        sys.exit(str(error))
    print(json.dumps(to_json(latency)))


if __name__ == "__main__":
    main()
