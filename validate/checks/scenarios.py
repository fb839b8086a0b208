"""What is run: the ways in which a runtime feeds a decoder. Each scenario returns what the artifact said, by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from dispc.reference.truth import Text
from dispc.runtime.bound import BoundDecoder
from dispc.runtime.session import Array, Artifact, Runner, Tokens
from dispc.support.check import Check
from dispc.support.errors import ArtifactError

STEPS = 64
SHORTEST = 16
"""Tokens that the longer scenarios need."""
PROMPT_LENGTHS = (9, 1, 17, 5)
LONGEST_PROMPT = 4096
"""Tokens that are really run to come near the model's limit, where positions cannot be given."""


class Skip(Exception):
    """A scenario does not apply here; the message says why."""


@dataclass(frozen=True)
class Row:
    """What the artifact said about `text` at the token indices `at` [n]: outputs [n, width] by name."""

    text: Text
    at: Tokens
    outputs: dict[str, Array]

    def part(self, where: slice) -> "Row":
        """The same at some of its indices."""
        return Row(self.text, self.at[where], {name: value[where] for name, value in self.outputs.items()})


@dataclass(frozen=True)
class Scenario:
    """One way to feed an artifact. Those that are `quick` run at the end of every compilation too.

    Where `documented` the artifact may say anything: the figure is told and not judged.
    """

    name: str
    play: Callable[["Stage"], tuple[list[Row], str]]
    quick: bool = False
    documented: Callable[["Stage"], bool] = field(default=lambda stage: False)
    streams: bool = True
    """Whether it can be played with the residual streams as outputs (not with buffers bound beforehand)."""


class Stage:
    """An artifact and the random tokens that it is fed; the same seed gives the same tokens.

    `window`: the tokens of the sliding window that some of its layers attend to; 0 for none.
    """

    def __init__(self, artifact: Artifact, vocabulary: int, seed: int = 0, *, window: int = 0) -> None:
        self.artifact = artifact
        self.runner = artifact.runner
        self.vocabulary, self.seed, self.window = vocabulary, seed, window
        self.length = min(STEPS + 8, artifact.positions // 2)

    def tokens(self, stream: int, length: int) -> Tokens:
        return np.random.default_rng((self.seed, stream)).integers(0, self.vocabulary, length)

    @cached_property
    def text(self) -> Tokens:
        """The tokens that most scenarios feed in different pieces: the reference reads them once."""
        return self.tokens(0, self.length)

    def feed(self, rows: Sequence[Tokens], padding: str | None = None, offset: int = 0) -> "Feeder":
        padding = padding or self.artifact.padding
        return Feeder(self.runner, rows, padding, offset, compact=padding == self.artifact.padding == "right")


class Feeder:
    """Feeds the rows of a batch piece by piece through the cache, and keeps every output of every real token.

    `compact`: a row's tokens are the first positions of its cache, as GroupQueryAttention keeps them; otherwise caches
    grow behind what there is, padding included.
    """

    def __init__(self, runner: Runner, rows: Sequence[Tokens], padding: str, offset: int = 0, *, compact: bool) -> None:
        self.runner, self.rows, self.padding, self.offset, self.compact = runner, rows, padding, offset, compact
        self.fed = np.zeros(len(rows), dtype=np.int64)
        self.mask = np.zeros((len(rows), 0), dtype=np.int64)
        self.caches = runner.empty_caches(len(rows))
        self.kept: list[list[dict[str, Array]]] = [[] for _ in rows]

    def prefill(self, lengths: Sequence[int]) -> "Feeder":
        """Feed the first `lengths[b]` tokens of each row, padded to one length."""
        width = max(lengths)
        ids, self.mask = np.zeros((2, len(self.rows), width), dtype=np.int64)
        where = [slice(width - n, width) if self.padding == "left" else slice(0, n) for n in lengths]
        for row, tokens in enumerate(self.rows):
            ids[row, where[row]], self.mask[row, where[row]] = tokens[: lengths[row]], 1
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0) + self.offset
        self._run(ids, positions, where)
        self.fed = np.array(lengths, dtype=np.int64)
        return self

    def extend(self, count: int = 1) -> "Feeder":
        """Feed the next `count` tokens of each row behind what the caches hold."""
        ids = np.stack([tokens[at : at + count] for tokens, at in zip(self.rows, self.fed, strict=True)])
        positions = self.fed[:, None] + np.arange(count) + self.offset
        self.fed = self.fed + count
        if self.compact:
            self.mask = (np.arange(self.mask.shape[1] + count)[None] < self.fed[:, None]).astype(np.int64)
        else:
            self.mask = np.concatenate([self.mask, np.ones_like(ids)], axis=1)
        self._run(ids, positions, [slice(0, count)] * len(self.rows))
        return self

    def _run(self, ids: Tokens, positions: Tokens, where: Sequence[slice]) -> None:
        outputs, self.caches = self.runner.run_all(ids, self.mask, positions, self.caches)
        for row, kept in enumerate(self.kept):
            kept.append({name: value[row, where[row]] for name, value in outputs.items()})

    def said(self, start: int = 0) -> list[Row]:
        """What was said about each row from token `start` on."""
        found = []
        for tokens, count, kept in zip(self.rows, self.fed, self.kept, strict=True):
            outputs = {name: np.concatenate([piece[name] for piece in kept])[start:] for name in kept[0]}
            text = Text(tuple(tokens[:count].tolist()), self.offset)
            found.append(Row(text, np.arange(start, count), outputs))
        return found


Played = tuple[list[Row], str]


def prefill(stage: Stage) -> Played:
    """One prompt in one run: every position."""
    return stage.feed([stage.text]).prefill([stage.length]).said(), f"1 prompt of {stage.length} tokens"


def one_token(stage: Stage) -> Played:
    """A sequence of length 1 on an empty past."""
    return stage.feed([stage.text]).prefill([1]).said(), "1 prompt of 1 token, empty past"


def decode(stage: Stage) -> Played:
    """Token by token through the cache, from the first."""
    feeder = stage.feed([stage.text]).prefill([1])
    for _ in range(stage.length - 1):
        feeder.extend()
    return feeder.said(), f"{stage.length - 1} steps with the cache"


def handover(first: float) -> Callable[[Stage], Played]:
    """A cache goes from a prefill of the share `first` to one of the rest, and on to single steps."""

    def play(stage: Stage) -> Played:
        steps = 3
        start = max(1, int(first * (stage.length - steps)))
        feeder = stage.feed([stage.text]).prefill([start]).extend(stage.length - steps - start)
        for _ in range(steps):
            feeder.extend()
        return feeder.said(), f"{start} tokens, then {stage.length - steps - start}, then {steps} steps"

    return play


def _unequal(stage: Stage, padding: str) -> Played:
    lengths = [min(length, stage.length) for length in PROMPT_LENGTHS]
    rows = [stage.tokens(1 + row, length + 2) for row, length in enumerate(lengths)]
    feeder = stage.feed(rows, padding).prefill(lengths).extend().extend()
    return feeder.said(), f"{len(rows)} prompts of {min(lengths)} to {max(lengths)} tokens, padded {padding}"


def padded_batch(stage: Stage) -> Played:
    """Unequal prompts in one batch, padded on the declared side, then two steps each; against each one alone."""
    return _unequal(stage, stage.artifact.padding)


def other_side(stage: Stage) -> Played:
    """The same with padding on the side that the artifact does not declare, as if the client did not know."""
    unguarded = Stage(stage.artifact, stage.vocabulary, stage.seed, window=stage.window)
    unguarded.runner = Runner(stage.artifact.session)
    side = "left" if stage.artifact.padding == "right" else "right"
    rows, detail = _unequal(unguarded, side)
    if stage.artifact.padding == "right":
        detail += " (wrong without a word in ONNX Runtime, refused by dispc's own loop)"
    elif stage.window:
        detail += " (padding behind a prompt takes up room in the sliding window)"
    return rows, detail


def near_the_limit(stage: Stage) -> Played:
    """The last positions that the model has."""
    limit, count, steps = stage.artifact.positions, min(24, stage.length), 8
    if "position_ids" in stage.runner.inputs:
        rows = [stage.text[:count]]
        feeder = stage.feed(rows, offset=limit - count).prefill([count - steps])
        detail = f"positions {limit - count} to {limit - 1}, the last {steps} with the cache"
    elif limit <= LONGEST_PROMPT:
        feeder = stage.feed([stage.tokens(8, limit)]).prefill([limit - steps])
        detail = f"{limit} tokens, the last {steps} with the cache"
    else:
        raise Skip(
            f"no position_ids, and {limit} tokens are too many to run; the rotary tables are compared at all positions"
        )
    for _ in range(steps):
        feeder.extend()
    return feeder.said(int(feeder.fed[0]) - count), detail


def behind_the_window(stage: Stage) -> Played:
    """A prompt that is longer than the sliding window, and steps behind it."""
    count, steps = min(24, stage.length), 8
    length = stage.window + count
    if not stage.window:
        raise Skip("no layer attends to a sliding window")
    if length > stage.artifact.positions:
        raise Skip(f"a window of {stage.window}, and {stage.artifact.positions} positions: none slides out of it")
    if stage.window > LONGEST_PROMPT:
        raise Skip(f"a window of {stage.window}: more tokens than are run")
    feeder = stage.feed([stage.tokens(10, length)]).prefill([length - steps])
    for _ in range(steps):
        feeder.extend()
    return feeder.said(length - count), f"{length} tokens, the last {steps} with the cache; a window of {stage.window}"


def shared_buffer(stage: Stage) -> Played:
    """Past and present are one buffer with room to spare, as onnxruntime-genai runs it."""
    decoder, prompt = _shared_decoder(stage, stage.artifact, graph=False), stage.length // 3
    found = [decoder.feed(stage.text[None, :prompt])]
    found += [decoder.feed(stage.text[None, at : at + 1]) for at in range(prompt, stage.length)]
    outputs = {"logits": np.concatenate(found, axis=1)[0]}
    row = Row(Text(tuple(stage.text.tolist())), np.arange(stage.length), outputs)
    return [row], f"a prompt of {prompt} and {stage.length - prompt} steps in a buffer of {decoder.capacity}"


def graph_replay(stage: Stage) -> Played:
    """A CUDA graph is captured behind one prompt and replayed behind another of a different length."""
    provider = stage.artifact.provider
    if provider.graph_options is None:
        raise Skip(f"CUDA graphs need a CUDA device; judged on {provider.title}")
    artifact = Artifact(
        stage.artifact.directory, provider=provider, exact=True, provider_options=provider.graph_options
    )
    decoder, rows = _shared_decoder(stage, artifact, graph=True), []
    for prompt in (stage.length // 3, stage.length // 2):
        decoder.reset()
        found = [decoder.feed(stage.text[None, :prompt])]
        found += [decoder.feed(stage.text[None, at : at + 1]) for at in range(prompt, stage.length)]
        outputs = {"logits": np.concatenate(found, axis=1)[0]}
        rows.append(Row(Text(tuple(stage.text.tolist())), np.arange(stage.length), outputs))
    return rows, f"captured behind {stage.length // 3} tokens, replayed behind {stage.length // 2}"


def _shared_decoder(stage: Stage, artifact: Artifact, *, graph: bool) -> BoundDecoder:
    if artifact.manifest["attention"] != "GroupQueryAttention" or artifact.padding != "right":
        raise Skip("only GroupQueryAttention with padding on the right writes into a shared buffer")
    return BoundDecoder(artifact, batch=1, capacity=stage.length + 8, shared=True, graph=graph)


def greedy(stage: Stage) -> Played:
    """The artifact's own greedy continuation; the reference must choose the same token at every step."""
    prompt = min(8, stage.length)
    steps = min(STEPS, stage.artifact.positions - prompt)
    tokens = np.zeros(prompt + steps, dtype=np.int64)
    tokens[:prompt] = stage.tokens(9, prompt)
    feeder = stage.feed([tokens]).prefill([prompt])
    for at in range(prompt, prompt + steps):
        tokens[at] = int(feeder.kept[0][-1]["logits"][-1].argmax())
        feeder.extend()
    return feeder.said(prompt - 1), f"{steps} steps of the artifact's own continuation"


def judge_bits(stage: Stage) -> Check:
    """The same prompt, and a step behind it, run twice, gives the same bits."""
    runs = []
    try:
        for _ in range(2):
            (row,) = stage.feed([stage.text]).prefill([stage.length - 1]).extend().said()
            runs.append(row.outputs["logits"])
    except ArtifactError as error:
        return Check.failed("same bits", "parity", str(error))
    differing = float((runs[0].view(np.uint32) != runs[1].view(np.uint32)).sum())
    detail = "the same prompt and step twice"
    return Check.against("same bits", "parity", differing, 0.0, "numbers that differ", detail)


PREFILL = Scenario("prefill", prefill, quick=True)
GREEDY = Scenario("greedy tokens", greedy, quick=True)
SCENARIOS = (
    PREFILL,
    Scenario("one token", one_token),
    Scenario("decode", decode, quick=True),
    Scenario("cache from long to short", handover(0.85)),
    Scenario("cache from short to long", handover(0.1)),
    Scenario("padded batch", padded_batch, quick=True),
    Scenario(
        "padding of the other side",
        other_side,
        documented=lambda stage: stage.artifact.padding == "right" or stage.window > 0,
    ),
    Scenario("positions near the limit", near_the_limit),
    Scenario("behind the sliding window", behind_the_window),
    Scenario("shared past and present", shared_buffer, streams=False),
    Scenario("CUDA graph replay", graph_replay, streams=False),
    GREEDY,
)


@dataclass(frozen=True)
class Turn:
    """A scenario that was played: what was said, or the check that it came to without anything being said."""

    scenario: Scenario
    rows: list[Row]
    detail: str
    told: bool = False
    check: Check | None = None


def play(stage: Stage, *, quick: bool) -> list[Turn]:
    """Play the scenarios; one that does not apply is skipped, one that ONNX Runtime cannot run has failed."""
    turns = []
    for scenario in SCENARIOS:
        if quick and not scenario.quick:
            continue
        try:
            if not scenario.quick and stage.length < SHORTEST:
                raise Skip(f"a context of {stage.artifact.positions} positions is too short")
            rows, detail = scenario.play(stage)
            turns.append(Turn(scenario, rows, detail, told=scenario.documented(stage)))
        except Skip as reason:
            turns.append(Turn(scenario, [], "", check=Check.skipped(scenario.name, "parity", str(reason))))
        except ArtifactError as error:
            turns.append(Turn(scenario, [], "", check=Check.failed(scenario.name, "parity", str(error))))
    return turns
