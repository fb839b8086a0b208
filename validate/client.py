"""How an artifact is fed: seeded random tokens in batches, padded on either side, piece by piece through the cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dispc.reference.truth import Text
from dispc.runtime.session import Artifact, Runner
from dispc.support.arrays import Array, Tokens

SHORT = 72
"""Tokens of the shorter runs, the model's positions allowing."""
REACH = 4096
"""Most tokens that are run: to the end of a shorter context, and past a shorter window."""
LONG = 1024
"""At least so many tokens are run in a context that is longer than REACH."""
SPREAD = 128
"""Most tokens that the seed adds to a length."""


@dataclass(frozen=True)
class Row:
    """The outputs [n, width] of an artifact, by name, at the token indices `at` [n] of `text`."""

    text: Text
    at: Tokens
    outputs: dict[str, Array]

    def part(self, where: slice) -> "Row":
        """The same at some of its indices."""
        return Row(self.text, self.at[where], {name: value[where] for name, value in self.outputs.items()})


class Client:
    """An artifact and the random tokens that it is fed; the same seed gives the same tokens, lengths and batches.

    `window`: the tokens of the sliding window that some of its layers attend to; 0 for none.
    """

    def __init__(self, artifact: Artifact, vocabulary: int, seed: int = 0, *, window: int = 0) -> None:
        self.artifact = artifact
        self.runner = artifact.runner
        self.vocabulary, self.seed, self.window = vocabulary, seed, window
        self.length = min(SHORT, artifact.positions // 2)

    @property
    def limit(self) -> int:
        """The positions that the model has."""
        return self.artifact.positions

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest run: all positions, or at least LONG and, up to REACH, more than a window holds."""
        if self.limit <= REACH:
            return self.limit
        after = self.window if self.window <= REACH else 0
        return min(self.limit, max(LONG, after) + self.draw("longest", 32, SPREAD))

    def draw(self, what: str, low: int, high: int) -> int:
        """A number from `low` to `high`, drawn by the seed and by the name of its purpose."""
        return int(np.random.default_rng((self.seed, *what.encode())).integers(low, high + 1))

    def tokens(self, stream: int, length: int) -> Tokens:
        """Random token ids [length]; another `stream` gives others."""
        return np.random.default_rng((self.seed, stream)).integers(0, self.vocabulary, length)

    @cached_property
    def text(self) -> Tokens:
        """The text whose beginnings most scenarios feed in different pieces, so that the reference reads it once."""
        return self.tokens(0, self.longest)

    def batch(self, rows: Sequence[Tokens], padding: str | None = None, offset: int = 0) -> "Batch":
        """`rows` ready to be fed, padded as the artifact declares unless `padding` says otherwise."""
        padding = padding or self.artifact.padding
        return Batch(self.runner, rows, padding, offset, compact=padding == self.artifact.padding == "right")


class Batch:
    """Feeds the rows of a batch piece by piece through the cache, and keeps every output of every real token.

    `compact`: a row's tokens are the first positions of its cache, as GroupQueryAttention keeps them; otherwise new
    tokens are appended to the caches, padding included. Positions count from `offset`.
    """

    def __init__(self, runner: Runner, rows: Sequence[Tokens], padding: str, offset: int = 0, *, compact: bool) -> None:
        self.runner, self.rows, self.padding, self.offset, self.compact = runner, rows, padding, offset, compact
        self.fed = np.zeros(len(rows), dtype=np.int64)
        self.mask = np.zeros((len(rows), 0), dtype=np.int64)
        self.caches = runner.empty_caches(len(rows))
        self.kept: list[list[dict[str, Array]]] = [[] for _ in rows]

    def prefill(self, lengths: Sequence[int]) -> "Batch":
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

    def extend(self, count: int = 1) -> "Batch":
        """Feed the next `count` tokens of each row after what the caches hold."""
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

    def outputs(self, start: int = 0) -> list[Row]:
        """The outputs for each row from token `start` on."""
        rows = []
        for tokens, count, kept in zip(self.rows, self.fed, self.kept, strict=True):
            outputs = {name: np.concatenate([piece[name] for piece in kept])[start:] for name in kept[0]}
            text = Text(tuple(tokens[:count].tolist()), self.offset)
            rows.append(Row(text, np.arange(start, count), outputs))
        return rows
