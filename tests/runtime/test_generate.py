"""Text from an artifact: how tokens are chosen, when they stop, and that every piece of text arrives as it is."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command
import harness
import numpy as np
import pytest
import tiny
import torch
from command import assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from language import ASCII, HALVES, SPECIAL, make_tokenizer
from tokenizers import decoders
from transformers import AutoModelForCausalLM

from dispc.model.tokenizer import load_tokenizer
from dispc.runtime.generate import Sampler, generate_text, generate_tokens
from dispc.runtime.session import Artifact
from dispc.support.errors import ArtifactError

LOGITS = arrays.arrays(np.float32, st.integers(1, 40), elements=st.integers(-300, 300).map(lambda n: n / 10))
TEMPLATE = "{% for m in messages %}<u>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
TRICKY = range(len(SPECIAL) + len(ASCII), len(SPECIAL) + len(ASCII) + len(HALVES))
PUNCTUATION = [len(SPECIAL) + ASCII.index(letter) for letter in ".,'?!snt"]
"""Tokens before which some tokenizers remove a space."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense artifacts of one model: `plain`, `chat` with a chat template, `mute` without a tokenizer."""
    place = tmp_path_factory.mktemp("generate")
    for name in ("plain", "chat", "mute"):
        model = tiny.make_model("llama", place / f"{name}-model")
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))  # never stops by itself
        if name != "mute":
            make_tokenizer(model, TEMPLATE if name == "chat" else None)
        outcome = command.run("compile", model, "-t", "onnx-cpu", "--dense", "--no-validate", "-o", place / name)
        assert outcome.code == 0, outcome
    return place


@pytest.fixture(scope="module")
def artifact(place: Path) -> Artifact:
    return Artifact(place / "plain")


# The sampler


@given(LOGITS, st.integers(0, 9), st.floats(0.0, 1.0), st.integers(0, 9))
def test_temperature_0_and_top_p_0_choose_the_likeliest_token(logits: Any, step: int, top_p: float, seed: int) -> None:
    assert Sampler(0.0, top_p, seed).choose(logits, step) == logits.argmax()
    assert Sampler(1.0, 0.0, seed).choose(logits, step) == logits.argmax()


@given(LOGITS, st.floats(0.05, 5.0), st.floats(0.0, 1.0), st.integers(0, 99), st.integers(0, 99))
def test_a_token_is_drawn_from_the_smallest_likeliest_set_that_holds_top_p(
    logits: Any, temperature: float, top_p: float, seed: int, step: int
) -> None:
    sampler = Sampler(temperature, top_p, seed)
    token = sampler.choose(logits, step)
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    assert probabilities[probabilities > probabilities[token] * (1 + 1e-9)].sum() <= top_p + 1e-9
    assert sampler.choose(logits.copy(), step) == token  # nothing but seed, step and logits decides


def test_sampling_follows_the_probabilities_and_differs_between_steps_and_seeds() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    drawn = [Sampler(1.0, 1.0, 3).choose(logits, step) for step in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / len(drawn), np.exp(logits), atol=0.03)
    assert drawn != [Sampler(1.0, 1.0, 4).choose(logits, step) for step in range(4000)]
    nucleus = [Sampler(1.0, 0.75, 3).choose(logits, step) for step in range(400)]
    assert set(nucleus) == {0, 1}


# The loop


def test_greedy_tokens_are_those_of_transformers(place: Path, artifact: Artifact) -> None:
    prompt = [5, 77, 12, 40]
    model = AutoModelForCausalLM.from_pretrained(place / "plain-model", dtype=torch.float32)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    assert list(generate_tokens(artifact, prompt, 40, Sampler(), frozenset())) == expected


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_generation_ends_at_the_limit(limit: int, artifact: Artifact) -> None:
    assert len(list(generate_tokens(artifact, [5], limit, Sampler(), frozenset()))) == limit


def test_generation_ends_before_a_stop_token(artifact: Artifact) -> None:
    sampler = Sampler(1.0, 1.0, 4)
    tokens = list(generate_tokens(artifact, [5, 77], 30, sampler, frozenset()))
    stop = tokens[11]
    stopped = list(generate_tokens(artifact, [5, 77], 30, sampler, frozenset([stop])))
    assert stopped == tokens[: tokens.index(stop)]


@pytest.mark.parametrize(("length", "expected"), [(159, 1), (157, 3), (120, 10)])
def test_generation_ends_where_the_context_ends(length: int, expected: int, artifact: Artifact) -> None:
    assert artifact.positions == 160
    assert len(list(generate_tokens(artifact, [5] * length, 10, Sampler(), frozenset()))) == expected


@pytest.mark.parametrize("length", [0, 160, 1000])
def test_a_prompt_that_does_not_fit_is_refused(length: int, artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=f"the prompt has {length} tokens; this model takes 1 to 159"):
        next(generate_tokens(artifact, [5] * length, 10, Sampler(), frozenset()))


# Text


@given(
    clean_up=st.booleans(), tokens=st.lists(st.sampled_from([*TRICKY, *PUNCTUATION]) | st.integers(0, 130), max_size=30)
)
@settings(max_examples=100)
def test_the_pieces_make_the_whole_text_and_no_piece_ends_in_half_a_character(
    clean_up: bool, tokens: list[int]
) -> None:
    directory = harness.scratch() / f"tokenizer-{clean_up}"
    if not directory.exists():
        make_tokenizer(directory, None, clean_up_tokenization_spaces=clean_up)
    pieces = spell(directory, tokens)
    letters = load_tokenizer(directory).convert_ids_to_tokens([token for token in tokens if token >= len(SPECIAL)])
    assert "".join(pieces) == decoders.ByteLevel().decode(letters)
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def spell(directory: Path, tokens: list[int]) -> list[str]:
    """The pieces that generate_text makes of `tokens`, without a model."""

    class Silent:
        stop_tokens: frozenset[int] = frozenset()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dispc.runtime.generate.Artifact", lambda directory: Silent())
        patch.setattr("dispc.runtime.generate.generate_tokens", lambda *args: iter(tokens))
        return list(generate_text(directory, "x", 1, Sampler()))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [("plain", (), "hello"), ("chat", (), "<u>hello<a>"), ("chat", ("--raw",), "hello")],
)
def test_the_chat_template_is_applied_where_there_is_one(
    name: str, options: tuple[str, ...], expected: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = []

    def record(artifact: Artifact, prompt: list[int], *rest: Any) -> Iterator[int]:
        prompts.append(prompt)
        return iter([])

    monkeypatch.setattr("dispc.runtime.generate.generate_tokens", record)
    assert command.run("generate", place / name, "hello", *options).code == 0
    assert load_tokenizer(place / name).decode(prompts[0]) == expected


def test_the_command_prints_the_text_alone_and_the_same_every_time(place: Path) -> None:
    arguments = ("generate", place / "chat", "hello", "--max-new-tokens", 20)
    for more in ((), ("--temperature", 1.5, "--top-p", 0.9, "--seed", 3)):
        first, second = command.run(*arguments, *more), command.run(*arguments, *more)
        assert (first.code, first.err) == (0, "")
        assert first.out == second.out
        report = json.loads(command.run(*arguments, *more, "--json").out)
        assert report["prompt"] == "hello"
        assert report["text"] + "\n" == first.out
    assert command.run(*arguments, "--temperature", 1.5, "--seed", 4).out != first.out


def test_text_is_printed_as_it_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = ["\tdef", " f():\n", ":smile: [bold]x[/bold] [/", "] \x1b ", "\u00e9" * 300]
    monkeypatch.setattr("dispc.runtime.generate.generate_text", lambda *args, **options: iter(pieces))
    assert command.run("generate", place / "plain", "x").out == "".join(pieces) + "\n"


@pytest.mark.parametrize(
    ("name", "prompt", "says"),
    [
        ("plain", "", "is empty"),
        ("plain", "x" * 160, "the prompt has 160 tokens; this model takes 1 to 159"),
        ("chat", "x" * 158, "the prompt has 164 tokens"),
        ("mute", "x", "no tokenizer; one of tokenizer.json"),
        ("plain-model", "x", "is not an artifact"),
        ("nowhere", "x", "is not an artifact"),
    ],
)
def test_what_cannot_be_generated_is_refused(name: str, prompt: str, says: str, place: Path) -> None:
    assert_refused(place, "generate", place / name, prompt, says=(says,))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", "{}", "no tokenizer that transformers can load"),
        ("tokenizer.json", "nonsense", "no tokenizer that transformers can load"),
        ("tokenizer_config.json", "nonsense", "is not valid JSON"),
        ("chat_template.jinja", "{{ messages[0", "the chat template fails"),
        ("chat_template.jinja", "{{ raise_exception('no') }}", "the chat template fails"),
        ("model.onnx.data", "", "cannot load"),
    ],
)
def test_a_spoilt_artifact_is_refused(name: str, content: str, says: str, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "chat", tmp_path / "chat")
    assert (tmp_path / "chat" / name).is_file()
    (tmp_path / "chat" / name).write_text(content)
    assert_refused(tmp_path, "generate", tmp_path / "chat", "hello", says=(says, str(tmp_path / "chat")))


@pytest.mark.parametrize("options", [("--max-new-tokens", 0), ("--temperature", -1), ("--top-p", 2), ("--seed", -1)])
def test_numbers_out_of_range_are_refused(options: tuple[object, ...], place: Path) -> None:
    outcome = command.run("generate", place / "plain", "x", *options)
    assert outcome.code == 2
    assert str(options[0]) in outcome.err
