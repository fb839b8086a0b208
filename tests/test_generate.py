"""Choosing tokens, and the end of a generation."""

from pathlib import Path

import harness
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispc.compiler import CompileOptions, compile_model
from dispc.errors import ArtifactError
from dispc.generate import Sampler, generate_text, generate_tokens
from dispc.validate.session import Artifact

logits = st.lists(st.floats(-30, 30), min_size=1, max_size=20).map(np.array)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate") / "out"
    model = harness.checkpoint("llama").directory
    compile_model(CompileOptions(model=model, output=out, target="onnx-cpu", dense=True, validate=False))
    return out


@given(logits, st.integers(0, 9))
def test_temperature_zero_chooses_the_likeliest_token(values: harness.Array, step: int) -> None:
    assert values[Sampler().choose(values, step)] == values.max()


@given(logits, st.integers(0, 9), st.floats(0.1, 3.0), st.floats(0.0, 1.0))
def test_sampling_repeats_itself_and_stays_within_the_nucleus(
    values: harness.Array, step: int, temperature: float, top_p: float
) -> None:
    sampler = Sampler(temperature, top_p, seed=5)
    token = sampler.choose(values, step)
    assert token == sampler.choose(values, step)
    probabilities = np.exp((values - values.max()) / temperature)
    probabilities /= probabilities.sum()
    likelier = probabilities[probabilities > probabilities[token] * (1 + 1e-9)].sum()
    assert likelier <= top_p + 1e-9


@given(logits)
def test_a_nucleus_of_nothing_is_greedy(values: harness.Array) -> None:
    assert values[Sampler(1.0, 0.0).choose(values, 0)] == pytest.approx(values.max())


def test_generation_ends_at_the_limit_at_a_stop_token_and_at_the_end_of_the_context(artifact: Path) -> None:
    loaded = Artifact(artifact)
    tokens = list(generate_tokens(loaded, [5, 6, 7], 12, Sampler(), frozenset()))
    assert len(tokens) == 12
    stop = tokens[4]
    first = tokens.index(stop)
    assert list(generate_tokens(loaded, [5, 6, 7], 12, Sampler(), frozenset([stop]))) == tokens[:first]
    long_prompt = [5] * (loaded.positions - 3)
    assert len(list(generate_tokens(loaded, long_prompt, 12, Sampler(), frozenset()))) == 3


@pytest.mark.parametrize("length", [0, 160, 200])
def test_prompts_that_do_not_fit_are_refused(artifact: Path, length: int) -> None:
    with pytest.raises(ArtifactError, match=f"the prompt has {length} tokens"):
        next(generate_tokens(Artifact(artifact), [5] * length, 4, Sampler(), frozenset()))


def test_an_artifact_without_a_tokenizer_says_so(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="no tokenizer"):
        next(generate_text(artifact, "hello", 4, Sampler()))
