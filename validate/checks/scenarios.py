"""Scenarios: the ways in which a runtime feeds a decoder. Each returns the artifact's outputs, by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dispc.reference.truth import Text
from dispc.runtime.bound import BoundDecoder
from dispc.runtime.session import Artifact, Runner
from dispc.support.errors import ArtifactError
from dispc.validate.checks.check import Check
from dispc.validate.client import REACH, Client, Row

STEPS = 64
"""Tokens of the greedy continuation."""
SHORTEST = 16
"""Tokens that the longer scenarios need."""
ROWS, MORE_ROWS = 9, 3
"""Rows of the padded batch, and by how many it may have more."""
LAST, LAST_STEPS = 24, 8
"""Tokens that are judged near the limit, and steps with the cache at the end of a long text."""


class Skip(Exception):
    """A scenario does not apply here; the message says why."""


Result = tuple[list[Row], str]
"""Outputs by row, and in words what was run."""


@dataclass(frozen=True)
class Scenario:
    """One way to feed an artifact. Those that are `quick` run at the end of every compilation too.

    Where `documented` the outputs are known to be wrong: the figure is noted and not judged. `streams`: whether it can
    run with the residual streams as outputs (not with buffers bound beforehand).
    """

    name: str
    run: Callable[[Client], Result]
    quick: bool = False
    documented: Callable[[Client], bool] = field(default=lambda client: False)
    streams: bool = True


@dataclass(frozen=True)
class ScenarioRun:
    """A scenario that was run: its outputs, or the check that stands for them where there are none."""

    scenario: Scenario
    rows: list[Row]
    detail: str
    noted: bool = False
    check: Check | None = None


def run_scenario(scenario: Scenario, client: Client) -> ScenarioRun:
    """Run one; where it does not apply it is skipped, where ONNX Runtime cannot run it it has failed."""
    try:
        if not scenario.quick and client.length < SHORTEST:
            raise Skip(f"a context of {client.limit} positions is too short")
        rows, detail = scenario.run(client)
        return ScenarioRun(scenario, rows, detail, noted=scenario.documented(client))
    except Skip as reason:
        return ScenarioRun(scenario, [], "", check=Check.skipped(scenario.name, "parity", str(reason)))
    except ArtifactError as error:
        return ScenarioRun(scenario, [], "", check=Check.failed(scenario.name, "parity", str(error)))


def prefill(client: Client) -> Result:
    """One prompt in one run: every position."""
    return client.batch([client.text]).prefill([client.length]).outputs(), f"1 prompt of {client.length} tokens"


def one_token(client: Client) -> Result:
    """A sequence of length 1 on an empty past."""
    return client.batch([client.text]).prefill([1]).outputs(), "1 prompt of 1 token, empty past"


def decode(client: Client) -> Result:
    """Token by token through the cache, from the first."""
    batch = client.batch([client.text]).prefill([1])
    for _ in range(client.length - 1):
        batch.extend()
    return batch.outputs(), f"{client.length - 1} steps with the cache"


def long_prompt(client: Client) -> Result:
    """The longest prompt, in one run."""
    rows = client.batch([client.text]).prefill([client.longest]).outputs()
    if not client.window:
        window = ""
    elif client.window < client.longest:
        window = f", past the sliding window of {client.window}"
    else:
        window = f"; nothing slides out of a window of {client.window}"
    return rows, f"1 prompt of {client.longest:,} of {client.limit:,} positions{window}"


def long_pieces(client: Client) -> Result:
    """The same tokens in unequal pieces through the cache, from short to long and from long to short, then steps."""
    first, rest = client.draw("first piece", 1, 16), client.longest - LAST_STEPS
    second = client.draw("second piece", (rest - first) // 4, (rest - first) // 2)
    third = client.draw("third piece", 2, 24)
    sizes = [second, third, rest - first - second - third] if rest - first - second > third else [rest - first]
    batch = client.batch([client.text]).prefill([first])
    for size in sizes + [1] * LAST_STEPS:
        batch.extend(size)
    pieces = ", ".join(map(str, (first, *sizes)))
    return batch.outputs(), f"{client.longest:,} tokens in pieces of {pieces}, then {LAST_STEPS} steps"


def near_the_limit(client: Client) -> Result:
    """The last positions of a context that is too long to be run."""
    count = min(LAST, client.length)
    if client.limit <= REACH:
        raise Skip("the long prompt reaches them")
    if "position_ids" not in client.runner.inputs:
        raise Skip(
            f"no position_ids, and {client.limit:,} tokens are too many to run; rotary tables are compared at all"
        )
    batch = client.batch([client.text[:count]], offset=client.limit - count).prefill([count - LAST_STEPS])
    for _ in range(LAST_STEPS):
        batch.extend()
    return batch.outputs(), f"positions {client.limit - count} to {client.limit - 1}, {LAST_STEPS} with the cache"


def padded_batch(client: Client) -> Result:
    """Unequal prompts in one batch, padded on the declared side, then two steps each; against each one alone."""
    return _unequal(client, client.artifact.padding)


def _unequal(client: Client, padding: str) -> Result:
    count = ROWS + client.draw("rows", 0, MORE_ROWS)
    longest = min(client.length, 40)
    lengths = [1, longest, *(client.draw(f"row {row}", 1, longest) for row in range(2, count))]
    lengths = [int(length) for length in np.random.default_rng((client.seed, 11)).permutation(lengths)]
    rows = [client.tokens(1000 + row, length + 2) for row, length in enumerate(lengths)]
    batch = client.batch(rows, padding).prefill(lengths).extend().extend()
    return batch.outputs(), f"{count} prompts of 1 to {longest} tokens, padded {padding}, then 2 steps"


def other_side(client: Client) -> Result:
    """The same with padding on the side that the artifact does not declare, as if the client did not know."""
    unguarded = Client(client.artifact, client.vocabulary, client.seed, window=client.window)
    unguarded.runner = Runner(client.artifact.session)
    side = "left" if client.artifact.padding == "right" else "right"
    rows, detail = _unequal(unguarded, side)
    if client.artifact.padding == "right":
        detail += " (ONNX Runtime computes something else without an error; dispc's own loop refuses it)"
    elif client.window:
        detail += " (padding after a prompt takes up room in the sliding window)"
    return rows, detail


def shared_buffer(client: Client) -> Result:
    """Past and present are one buffer with room to spare, as onnxruntime-genai runs it."""
    decoder = _shared_decoder(client, client.artifact, graph=False)
    prompt = client.length // 3
    detail = f"a prompt of {prompt} and {client.length - prompt} steps in a buffer of {decoder.capacity}"
    return [_decode_shared(client, decoder, prompt)], detail


def graph_replay(client: Client) -> Result:
    """A CUDA graph is captured after one prompt and replayed after another of a different length."""
    provider = client.artifact.provider
    if provider.graph_options is None:
        raise Skip(f"CUDA graphs need a CUDA device; judged on {provider.title}")
    options = provider.graph_options
    artifact = Artifact(client.artifact.directory, provider=provider, exact=True, provider_options=options)
    decoder = _shared_decoder(client, artifact, graph=True)
    first, second = client.length // 3, client.length // 2
    rows = [_decode_shared(client, decoder, prompt) for prompt in (first, second)]
    return rows, f"captured after {first} tokens, replayed after {second}"


def _shared_decoder(client: Client, artifact: Artifact, *, graph: bool) -> BoundDecoder:
    if not artifact.manifest.shares_buffer:
        raise Skip("only GroupQueryAttention with padding on the right writes into a shared buffer")
    return BoundDecoder(artifact, batch=1, capacity=client.length + 8, shared=True, graph=graph)


def _decode_shared(client: Client, decoder: BoundDecoder, prompt: int) -> Row:
    decoder.reset()
    text = client.text[None, : client.length]
    pieces = [decoder.feed(text[:, :prompt])]
    pieces += [decoder.feed(text[:, at : at + 1]) for at in range(prompt, client.length)]
    outputs = {"logits": np.concatenate(pieces, axis=1)[0]}
    return Row(Text(tuple(text[0].tolist())), np.arange(client.length), outputs)


def greedy(client: Client) -> Result:
    """The artifact's own greedy continuation; the reference must choose the same token at every step."""
    prompt = min(8, client.length)
    steps = min(STEPS, client.limit - prompt)
    tokens = np.zeros(prompt + steps, dtype=np.int64)
    tokens[:prompt] = client.tokens(9, prompt)
    batch = client.batch([tokens]).prefill([prompt])
    for at in range(prompt, prompt + steps):
        tokens[at] = int(batch.kept[0][-1]["logits"][-1].argmax())
        batch.extend()
    return batch.outputs(prompt - 1), f"{steps} steps of the artifact's own continuation"


PREFILL = Scenario("prefill", prefill, quick=True)
GREEDY = Scenario("greedy tokens", greedy, quick=True)
SCENARIOS: Sequence[Scenario] = (
    PREFILL,
    Scenario("one token", one_token),
    Scenario("decode", decode, quick=True),
    Scenario("padded batch", padded_batch, quick=True),
    Scenario(
        "padding of the other side",
        other_side,
        documented=lambda client: client.artifact.padding == "right" or client.window > 0,
    ),
    Scenario("long prompt", long_prompt),
    Scenario("long prompt in pieces", long_pieces),
    Scenario("positions near the limit", near_the_limit),
    Scenario("shared past and present", shared_buffer, streams=False),
    Scenario("CUDA graph replay", graph_replay, streams=False),
    GREEDY,
)
