"""Perplexity by the usual WikiText-2 protocol, of a torch model or of an artifact.

The text is one run of tokens, cut into windows that do not overlap; each window is read on its own, its first token is
not scored, and what does not fill a window is left out. Perplexity is exp of the mean negative log likelihood.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dispc.manifest import MANIFEST, read_manifest
from dispc.masks import Masks
from dispc.model.published import open_checkpoint
from dispc.model.text import load_tokens, source_name, windows
from dispc.reference.masked import load_reference
from dispc.runtime.devices import torch_device
from dispc.runtime.providers import CPU, PROVIDERS, Provider
from dispc.runtime.session import Artifact
from dispc.support.arrays import Array, Tokens
from dispc.support.dtypes import name_of
from dispc.support.errors import DataError
from dispc.targets import TARGETS

DEFAULT_WINDOW = 2048


class TorchScorer:
    """The dense model of a directory, or with `masks` its masked reference, in float32."""

    def __init__(self, directory: Path, masks: Path | None = None, device: str = "cpu") -> None:
        place = torch_device(device)
        checkpoint = open_checkpoint(directory)
        chosen = Masks.load(masks) if masks else None
        if chosen is not None:
            chosen.check(checkpoint.config, masks)
        model = load_reference(checkpoint, chosen).to(place)
        self._set(model, directory, checkpoint.config.max_positions, device)

    @classmethod
    def of(cls, model: Any, directory: Path, positions: int) -> "TorchScorer":
        """A scorer around a `model` that is loaded already, on the CPU: nothing is read, nothing is masked.

        `directory` holds its tokenizer; `positions` is the longest sequence that it takes.
        """
        scorer = cls.__new__(cls)
        scorer._set(model, directory, positions, "cpu")
        return scorer

    def _set(self, model: Any, directory: Path, positions: int, device: str) -> None:
        self.model, self.directory, self.positions, self.device = model, directory, positions, device

    def pieces(self, tokens: Tokens) -> Iterator[Array]:
        """float32 logits [S,V] of one sequence [S], in one piece."""
        ids = torch.from_numpy(tokens)[None].to(self.device)
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False).logits[0]
        yield logits.float().cpu().numpy()

    def facts(self) -> dict[str, str]:
        """In what arithmetic, and where, it computes."""
        return {"dtype": name_of(self.model.dtype), "device": self.device}


class ArtifactScorer:
    """An artifact in ONNX Runtime, by default on the CPU."""

    def __init__(self, directory: Path, provider: Provider = CPU) -> None:
        self._set(Artifact(directory, provider=provider))
        if self.artifact.last_logits:
            raise DataError(f"{directory}: compiled with --last-logits; scoring a text needs the logits of every token")

    @classmethod
    def of(cls, artifact: Artifact) -> "ArtifactScorer":
        """A scorer around an artifact that is loaded already, with the logits of every token."""
        scorer = cls.__new__(cls)
        scorer._set(artifact)
        return scorer

    def _set(self, artifact: Artifact) -> None:
        self.artifact, self.directory, self.positions = artifact, artifact.directory, artifact.positions

    def pieces(self, tokens: Tokens) -> Iterator[Array]:
        """float32 logits [S,V] of one sequence [S], in order, as many rows at a time as the provider likes best."""
        runner, size = self.artifact.runner, self.artifact.provider.chunk or len(tokens)
        caches = runner.empty_caches(1)
        for start in range(0, len(tokens), size):
            positions = np.arange(start, min(start + size, len(tokens)))
            seen = np.ones((1, start + len(positions)), dtype=np.int64)
            logits, caches = runner.run(tokens[None, positions], seen, positions[None], caches)
            yield logits[0]

    def facts(self) -> dict[str, str]:
        """In what arithmetic, and where, it computes."""
        widened = ", weights widened to float32" if self.artifact.widened else ""
        return {"dtype": f"{self.artifact.dtype}{widened}", "device": self.artifact.provider.name}


Scorer = TorchScorer | ArtifactScorer


def open_scorer(path: Path, masks: Path | None = None, device: str = "cpu") -> Scorer:
    """An artifact when `path` holds one, else the model directory there, dense or masked; on `device`, or not at all.

    Raises:
        DispcError: when it is neither, masks are given for an artifact, which has its own, or the device is not there.
    """
    if not (path / MANIFEST).is_file():
        return TorchScorer(path, masks, device)
    if masks is not None:
        raise DataError(f"{path}: is an artifact, whose masks are compiled in; give --masks with a model directory")
    return ArtifactScorer(path, _provider(path, device))


def _provider(artifact: Path, device: str) -> Provider:
    """That of the artifact's target where it is on `device`, else the first that is."""
    providers = [provider for provider in PROVIDERS.values() if provider.device == device]
    if not providers:
        devices = dict.fromkeys(provider.device for provider in PROVIDERS.values())
        raise DataError(f"--device {device}: an artifact runs on {' or '.join(devices)}")
    target = TARGETS.get(read_manifest(artifact).target)
    provider = next((own for own in providers if target and own.name == target.provider), providers[0])
    if target and target.contrib and target.provider != provider.name and not provider.fallback:
        raise DataError(
            f"{artifact}: is for {PROVIDERS[target.provider].title} (target {target.name}); leave out --device {device}"
        )
    provider.require(f"{artifact}: --device {device}", "--device cpu runs the artifact on the CPU")
    return provider


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What was measured, with all that another needs to measure it again. The digest is of the windows read (int64)."""

    perplexity: float
    mean_nll: float
    windows: int
    sequence_length: int
    tokens_scored: int
    data: str
    tokens_sha256: str


def measure_perplexity(
    scorer: Scorer,
    data: str,
    *,
    sequence_length: int | None = None,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Perplexity on `data` (see `dispc.model.text.read_text`), in windows of 2,048 or of the model's limit.

    Raises:
        DataError: when the window is longer than the model's limit, or the text shorter than a window.
    """
    rows = text_windows(data, scorer.directory, scorer.positions, sequence_length)[:max_windows]
    length = rows.shape[1]
    total = 0.0
    for number, row in enumerate(rows):
        wanted = row[1:]
        for logits in scorer.pieces(row[:-1]):
            tokens, wanted = np.split(wanted, [len(logits)])
            total += float(negative_log_likelihood(logits, tokens).sum())
        progress(number + 1, len(rows))
    scored = len(rows) * (length - 1)
    mean = total / scored
    return Perplexity(
        perplexity=math.inf if mean >= 700 else math.exp(mean),
        mean_nll=mean,
        windows=len(rows),
        sequence_length=length,
        tokens_scored=scored,
        data=source_name(data),
        tokens_sha256=hashlib.sha256(rows.tobytes()).hexdigest(),
    )


def text_windows(data: str, directory: Path, positions: int, sequence_length: int | None = None) -> Tokens:
    """The windows [N, length] of `data` for the tokenizer of `directory`; raises as `measure_perplexity` does."""
    length = min(DEFAULT_WINDOW, positions) if sequence_length is None else sequence_length
    if not 2 <= length <= positions:
        raise DataError(f"windows of {length} tokens: {directory} takes 2 to {positions}")
    return windows(load_tokens(data, directory), length, data).astype(np.int64)


def logits_of(scorer: Scorer, tokens: Tokens) -> Array:
    """float32 logits [S,V] of one sequence [S]."""
    return np.concatenate([*scorer.pieces(tokens)])


def negative_log_likelihood(logits: Array, tokens: Tokens) -> Array:
    """-log p of tokens [S] under logits [S,V], float64 [S]."""
    values = torch.from_numpy(logits)
    chosen = values.gather(1, torch.from_numpy(tokens)[:, None])[:, 0].double()
    nll: Array = (torch.logsumexp(values, dim=-1).double() - chosen).numpy()
    return nll
