"""Text from an artifact: the smallest loop that respects the artifact's interface."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dispc.model.tokenizer import Tokenizer
from dispc.runtime.session import Artifact
from dispc.support.arrays import Array
from dispc.support.errors import ArtifactError


@dataclass(frozen=True)
class Sampler:
    """How a token is chosen: greedily at temperature 0, else from the likeliest tokens that hold `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def choose(self, logits: Array, step: int) -> int:
        """A token for logits [V]. The same seed, step and logits give the same token."""
        if self.temperature == 0.0:
            return int(logits.argmax())
        with np.errstate(over="ignore"):  # of a temperature near 0: only the likeliest is left
            probabilities = np.exp((logits.astype(np.float64) - logits.max()) / self.temperature)
        probabilities /= probabilities.sum()
        # Tokens below this hold less than 1 - top_p together, and lie outside: sorting the whole vocabulary takes long.
        likely = np.flatnonzero(probabilities >= 0.999 * (1.0 - self.top_p) / len(probabilities))
        order = likely[np.argsort(-probabilities[likely], kind="stable")]
        before = probabilities[order].cumsum() - probabilities[order]
        kept = order[before < max(self.top_p, np.finfo(float).tiny)]
        weights = probabilities[kept] / probabilities[kept].sum()
        return int(np.random.default_rng((self.seed, step)).choice(kept, p=weights))


def generate_tokens(
    artifact: Artifact, prompt: list[int], max_new_tokens: int, sampler: Sampler, stop: frozenset[int]
) -> Iterator[int]:
    """Yield new tokens until a stop token (not yielded), the limit, or the end of the model's context."""
    room = artifact.positions - len(prompt)
    if not prompt or room < 1:
        raise ArtifactError(f"the prompt has {len(prompt)} tokens; this model takes 1 to {artifact.positions - 1}")
    logits, state = artifact.prefill([prompt])
    for step in range(min(max_new_tokens, room)):
        token = sampler.choose(logits[0], step)
        if token in stop:
            return
        yield token
        if step + 1 < min(max_new_tokens, room):
            logits, state = artifact.step(np.array([token]), state)


def generate_text(
    directory: Path, prompt: str, max_new_tokens: int, sampler: Sampler, *, chat: bool = True
) -> Iterator[str]:
    """Yield the answer to `prompt` in pieces, as soon as each can be spelled.

    Raises:
        DispcError: when the artifact has no tokenizer, its chat template fails, or the prompt does not fit.
    """
    artifact = Artifact(directory)
    tokenizer = Tokenizer(directory)
    turn = tokenizer.chat(prompt) if chat else None
    ids = tokenizer.encode(prompt if turn is None else turn, special=turn is None)
    tokens: list[int] = []
    spelled = ""
    for token in generate_tokens(artifact, ids, max_new_tokens, sampler, artifact.stop_tokens):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # half of a character: wait for the rest
            yield text[len(spelled) :]
            spelled = text
    if tokens:
        yield tokenizer.decode(tokens)[len(spelled) :]
