"""Times a decoding step of many graphs in turns, each in a process of its own.

In one process the graphs are not alike: those loaded first took up to a quarter longer than the same graph loaded last.
A user's process has one.
"""

import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dispc.runtime.timing import alternate, turns

WARMUP_CALLS = 2


@contextmanager
def loaded(graph: Path, config: Path, past: int, threads: int) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds `graph` (model.onnx) and waits; `config` is the directory of a model of the same shape."""
    command = [sys.executable, __file__, str(graph), str(config), str(past), str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{graph}: the process that times it ended; see above")
        yield process
        process.stdin.close()


def milliseconds(process: "subprocess.Popen[str]", calls: int) -> float:
    """The median of so many calls, taken now."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{calls}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def time_steps(
    graphs: Mapping[str, Path], config: Path, *, past: int, threads: int, rounds: int, calls: int
) -> dict[str, list[float]]:
    """Milliseconds of a step with `past` tokens in the caches: of each graph, in each round the median of `calls`."""
    with ExitStack() as stack:
        processes = {name: stack.enter_context(loaded(graph, config, past, threads)) for name, graph in graphs.items()}
        found: dict[str, list[float]] = {name: [] for name in graphs}
        for name, counts in turns(graphs, rounds):
            taken = milliseconds(processes[name], calls)
            found[name] += [taken] if counts else []
    return found


def serve(graph: Path, config: Path, past: int, threads: int) -> None:
    """Load the graph, then answer each line of stdin, a number of calls, with their median in milliseconds."""
    import numpy as np
    from decoder import Decoder

    from dispc.model.checkpoint import Checkpoint

    model = Decoder(graph, Checkpoint(config).config, threads=threads)
    model.allocate(1, past + 1)
    step = model.bind(np.array([[7]]), past)
    print("ready", flush=True)
    for line in sys.stdin:
        times = alternate({0: step.run}, 1, int(line), warmup_rounds=0, warmup_calls=WARMUP_CALLS)
        print(statistics.median(times[0]), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
