"""Does an artifact compute what the masked reference computes? First version: on the CPU.

Errors are largest absolute logit differences, over the range (maximum - minimum) of the reference's logits.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dispc.checkpoint import Checkpoint
from dispc.errors import ArtifactError, MasksError
from dispc.masks import Masks
from dispc.quantised_reference import match_quantisation
from dispc.reference import load_reference
from dispc.validate.memory import require_memory_for_reference
from dispc.validate.session import Array, Artifact, Tokens

LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest error allowed, as a share of the logits' range, by the artifact's dtype (docs/parity.md says why)."""
INT8_ACTIVATIONS_LIMIT = 0.1
"""The same, for what the rounding of activations to int8 does to the last token's logits (docs/quantisation.md)."""
PROMPT_LENGTHS = (9, 1, 17, 5)
GREEDY_STEPS = 64


@dataclass(frozen=True, kw_only=True)
class Check:
    """One figure against its limit."""

    name: str
    figure: float
    limit: float
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All checks of one artifact."""

    artifact: str
    reference: str
    dtype: str
    padding: str
    judged_on: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"checks": [asdict(check) for check in self.checks], "passed": self.passed}


def check_parity(artifact_directory: Path, reference_directory: Path, *, seed: int = 0) -> Report:
    """Run every check of `artifact_directory` against the model of `reference_directory` with the artifact's own masks.

    Raises:
        ArtifactError, CheckpointError, MasksError: when the comparison cannot be made.
    """
    checkpoint = Checkpoint(reference_directory)
    artifact = Artifact(artifact_directory, exact=True)
    masks = Masks.load(artifact_directory / "masks.safetensors")
    masks.check(checkpoint.config, artifact_directory / "masks.safetensors")
    if masks.sha256() != artifact.manifest["masks_sha256"]:
        raise MasksError(f"{artifact_directory}: masks.safetensors is not the file that the artifact was compiled with")
    if checkpoint.config_sha256 != artifact.manifest["config_sha256"]:
        raise ArtifactError(f"{artifact_directory}: was not compiled from {reference_directory} (config.json differs)")
    require_memory_for_reference(checkpoint)
    reference = load_reference(reference_directory, checkpoint.family, masks)
    match_quantisation(reference, checkpoint.family, masks, artifact.manifest)
    judge = Judge(
        artifact,
        reference,
        np.random.default_rng(seed),
        checkpoint.config.vocab_size,
        checkpoint.config.max_positions,
    )
    with torch.inference_mode():
        checks: tuple[Check, ...] = (judge.prefill(), judge.decode(), judge.padded_batch(), judge.greedy())
        if artifact.int8_activations:
            checks += (judge.int8_activations(Artifact(artifact_directory)),)
    precision = "weights widened to float32" if artifact.widened else f"{artifact.dtype} as is"
    return Report(
        artifact=str(artifact_directory),
        reference=str(reference_directory),
        dtype=artifact.dtype,
        padding=artifact.padding,
        judged_on=f"CPUExecutionProvider, {precision}",
        checks=checks,
    )


class Judge:
    """The checks, on one artifact and its reference, with random tokens."""

    def __init__(
        self, artifact: Artifact, reference: Any, rng: np.random.Generator, vocabulary: int, positions: int
    ) -> None:
        self.artifact = artifact
        self.reference = reference
        self.rng = rng
        self.vocabulary = vocabulary
        self.length = min(48, positions // 2)
        self.greedy_steps = min(GREEDY_STEPS, positions - self.length)
        self.limit = LIMITS[artifact.dtype]

    def prefill(self) -> Check:
        """One prompt in one run: the logits of every position."""
        tokens = self._tokens(self.length)
        caches = self.artifact.runner.empty_caches(1)
        positions = np.arange(self.length)[None]
        logits, _ = self.artifact.runner.run(tokens[None], np.ones_like(tokens)[None], positions, caches)
        return self._logits("prefill", logits[0], self._reference(tokens), f"1 prompt of {self.length} tokens")

    def decode(self) -> Check:
        """The same kind of prompt token by token through the cache, against the reference's one long prefill."""
        tokens = self._tokens(self.length)
        logits, state = self.artifact.prefill([tokens[:1].tolist()])
        found = [logits[0]]
        for token in tokens[1:]:
            logits, state = self.artifact.step(token[None], state)
            found.append(logits[0])
        return self._logits("decode", np.stack(found), self._reference(tokens), f"{self.length} steps with the cache")

    def padded_batch(self) -> Check:
        """Unequal prompts in one batch, padded on the declared side, then two steps each; against each one alone."""
        lengths = [min(length, self.length) for length in PROMPT_LENGTHS]
        rows = [self._tokens(length + 2) for length in lengths]
        logits, state = self.artifact.prefill([row[:-2].tolist() for row in rows])
        found = [logits]
        for step in (-2, -1):
            logits, state = self.artifact.step(np.array([row[step] for row in rows]), state)
            found.append(logits)
        expected = [self._reference(row)[-3:] for row in rows]
        detail = f"{len(rows)} prompts of {min(lengths)} to {max(lengths)} tokens, padded {self.artifact.padding}"
        return self._logits("padded batch", np.stack(found, axis=1), np.stack(expected), detail)

    def greedy(self) -> Check:
        """The reference's greedy continuation: at each step the artifact must choose the same token.

        A different choice is excused only when the reference itself holds the two tokens for equal, within the limit.
        """
        prompt = self._tokens(min(8, self.length))
        logits, state = self.artifact.prefill([prompt.tolist()])
        output = self.reference(input_ids=torch.from_numpy(prompt)[None], use_cache=True)
        wrong = ties = 0
        for _ in range(self.greedy_steps):
            expected = output.logits[0, -1].float().numpy()
            token, choice = int(expected.argmax()), int(logits[0].argmax())
            if choice != token:
                tied = expected[token] - expected[choice] <= self.limit * np.ptp(expected)
                ties, wrong = ties + tied, wrong + (not tied)
            next_token = torch.tensor([[token]])
            output = self.reference(input_ids=next_token, past_key_values=output.past_key_values, use_cache=True)
            logits, state = self.artifact.step(np.array([token]), state)
        detail = f"{self.greedy_steps} steps, {ties} ties within the limit"
        return Check(name="greedy tokens", figure=float(wrong), limit=0.0, passed=wrong == 0, detail=detail)

    def int8_activations(self, shipped: Artifact) -> Check:
        """The artifact as it is, whose activations are rounded to int8, against itself in floating point."""
        tokens = [self._tokens(self.length).tolist()]
        error = logit_error(shipped.prefill(tokens)[0], self.artifact.prefill(tokens)[0])
        detail = f"after {self.length} tokens; the other checks are of the graph without them"
        limit = INT8_ACTIVATIONS_LIMIT
        return Check(name="int8 activations", figure=error, limit=limit, passed=error <= limit, detail=detail)

    def _tokens(self, length: int) -> Tokens:
        return self.rng.integers(0, self.vocabulary, length)

    def _reference(self, tokens: Tokens) -> Array:
        """float32 logits [S,V] of one sequence alone, without a cache."""
        logits: Array = (
            self.reference(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0].float().numpy()
        )
        return logits

    def _logits(self, name: str, found: Array, expected: Array, detail: str) -> Check:
        figure = logit_error(found, expected)
        return Check(name=name, figure=figure, limit=self.limit, passed=figure <= self.limit, detail=detail)


def logit_error(found: Array, expected: Array) -> float:
    """Largest absolute difference over the range of `expected`; infinite when `found` holds NaN or infinity."""
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(np.ptp(expected), np.finfo(np.float32).tiny))
