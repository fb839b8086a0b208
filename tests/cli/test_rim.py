"""Inputs from beyond every use: each is one line within seconds, or a harmless answer."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import language
import onnx
import pytest
import torch
from desk import Desk
from safetensors.torch import load_file, save_file

COMPILE = ("compile", "model", "-t", "onnx-cpu", "-o", "new", "--no-validate")
INSPECT, GENERATE, VALIDATE = ("inspect", "older"), ("generate", "older", "x"), ("validate", "older", "-r", "model")
Damage = Callable[[Path], object]


def edit(name: str, **values: Any) -> Damage:
    def damage(place: Path) -> None:
        file = place / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))

    return damage


def raw(name: str, text: str | bytes) -> Damage:
    return lambda place: (place / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def link(name: str) -> Damage:
    def damage(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to("nowhere")

    return damage


def tensor(name: str, value: torch.Tensor) -> Damage:
    def damage(place: Path) -> None:
        file = place / "model" / "model.safetensors"
        save_file(load_file(file) | {name: value}, file, {"format": "pt"})

    return damage


def graph(change: Callable[[onnx.ModelProto], object]) -> Damage:
    def damage(place: Path) -> None:
        model = onnx.load(place / "older" / "model.onnx", load_external_data=False)
        change(model)
        onnx.save(model, place / "older" / "model.onnx")

    return damage


def no_logits(place: Path) -> None:
    language.make_tokenizer(place / "older")
    graph(_rename_logits)(place)


def last_without_logits(place: Path) -> None:
    edit("older/dispc.json", logits="last")(place)
    no_logits(place)


def _rename_logits(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "logits":
                node.output[index] = "logit"
    model.graph.output[0].name = "logit"


def masks_of(dtype: torch.dtype) -> Damage:
    file = "masks.safetensors"
    return lambda place: save_file({"x": torch.zeros(4).to(dtype)}, place / file, {"format": "dispc-masks"})


HUGE = 10**400
DEEP: Any = {}
for _ in range(300):
    DEEP = {"a": DEEP}

REFUSED: list[tuple[str, Damage, tuple[str, ...], str]] = [
    ("a number of 401 digits", edit("model/config.json", rms_norm_eps=HUGE), COMPILE, "a whole number has 401 digits"),
    ("one in dispc.json", edit("older/dispc.json", trace_seconds=HUGE), INSPECT, "a whole number has 401 digits"),
    ("a long key", edit("model/config.json", **{"dropout" * 9000: 0}), COMPILE, "a key has 63,000 characters"),
    ("depth that json takes", edit("older/dispc.json", more=DEEP), INSPECT, "nested too deeply"),
    ("no positions", edit("older/dispc.json", positions=0), VALIDATE, "positions is 0"),
    ("many positions", edit("older/dispc.json", positions=10**9), VALIDATE, "positions is 1000000000"),
    ("another alignment", edit("older/dispc.json", align=10**30), VALIDATE, "align is 1000"),
    ("a side that is none", edit("older/dispc.json", padding="rigth"), GENERATE, "padding is 'rigth'"),
    ("one position", edit("model/config.json", max_position_embeddings=1), COMPILE, "a whole number from 8"),
    (
        "a leading zero",
        tensor("model.layers.00.mlp.up_proj.weight", torch.ones(3)),
        COMPILE,
        "00.mlp.up_proj.weight has",
    ),
    ("another alphabet", tensor("model.layers.\u0660.mlp.up_proj.weight", torch.ones(3)), COMPILE, "has no place"),
    ("a long number", tensor(f"model.layers.{'9' * 5000}.mlp.x", torch.ones(3)), COMPILE, "has no place"),
    ("settings that lead nowhere", link("model/generation_config.json"), COMPILE, "is a link that leads nowhere"),
    ("a template that leads nowhere", link("model/chat_template.jinja"), COMPILE, "is a link that leads nowhere"),
    ("an adapter that leads nowhere", link("model/adapter_config.json"), COMPILE, "is a link that leads nowhere"),
    ("a text that is null", raw("n.jsonl", "null"), ("eval", "model", "--data", "n.jsonl"), "a list of objects"),
    (
        "a row that is null",
        raw("n.json", '[{"text": "a"}, null]'),
        ("eval", "model", "--data", "n.json"),
        "not readable",
    ),
    ("an output of another name", no_logits, GENERATE, "it has no output logits"),
    ("the same of the last token", last_without_logits, VALIDATE, "it has no output logits"),
    ("the root as output", lambda place: None, ("compile", "model", "-t", "onnx-cpu", "-o", "/"), "exists already"),
    ("a target with a slash", lambda place: None, ("compile", "model", "-t", "a/b"), "a/b"),
    ("an alignment of any size", lambda place: None, (*COMPILE, "--align", "9" * 30), "cannot be aligned"),
    ("masks of no name", lambda place: None, ("learn", "model", "--data", "x.txt", "-o", ""), "-o is empty"),
    ("a target that nobody set", lambda place: None, ("compile", "model", "-t", ""), "what follows -t is empty"),
    ("a dtype that nobody set", lambda place: None, (*COMPILE, "--dtype="), "--dtype= is empty"),
    ("a prompt that nobody set", lambda place: None, ("generate", "older", ""), "what follows older is empty"),
    ("the root", lambda place: None, ("compile", "/", "-t", "onnx-cpu"), "/config.json: no such file"),
    ("masks that lead nowhere", link("model/masks.safetensors"), COMPILE, "is a link that leads nowhere"),
    ("a licence that leads nowhere", link("model/LICENSE"), COMPILE, "is a link that leads nowhere"),
    ("a card that leads nowhere", link("model/README.md"), COMPILE, "is a link that leads nowhere"),
    (
        "one number for many",
        lambda place: torch.save({"inputs": torch.zeros(1).expand(10**6, 10**7)}, place / "x.pt"),
        ("import-masks", "x.pt", "--model", "model", "-o", "new.safetensors"),
        "inputs has 10,000,000,000,000 numbers",
    ),
    ("masks of 8 bits", masks_of(torch.float8_e4m3fn), ("inspect", "masks.safetensors"), "must be uint8"),
    (
        "temperature 0 of what is drawn",
        edit("model/generation_config.json", do_sample=True, temperature=0.0),
        COMPILE,
        "temperature is 0 and do_sample is true",
    ),
    (
        "a scaling without a range",
        edit(
            "model/config.json",
            rope_scaling={
                "rope_type": "llama3",
                "factor": 2.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 2.0,
                "original_max_position_embeddings": 16,
            },
        ),
        COMPILE,
        "is not larger than its low_freq_factor",
    ),
    ("a value of any length", edit("model/config.json", hidden_act="x" * 10**6), COMPILE, " ... "),
]


@pytest.mark.parametrize(("damage", "words", "says"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_it_is_refused_in_one_line(
    damage: Damage, words: tuple[str, ...], says: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(desk.place)
    monkeypatch.chdir(desk.place)
    command.assert_refused(desk.place, *words, says=(says,))


def test_a_chat_template_sets_no_limits_of_its_own(desk: Desk) -> None:
    """The longer a text, the more time and memory its tokens may take: a template of a line must not buy hours."""
    language.make_tokenizer(desk.older, "{{ 'a ' * 10000000 }}")
    started = time.monotonic()
    command.assert_refused(desk.place, "generate", desk.older, "x", says=("the chat template makes 20,000,000 char",))
    assert time.monotonic() - started < 60  # hours before


CARDS = {
    "line ends": "---\n" + "\n" * 150_000 + "x",
    "aliases": "---\na0: &a0 {k: 1}\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    + "---\n",
    "words": "---\nlicense: mit\nlanguage:\n" + "- en\n" * 500_000 + "---\n",
    "an index of results": "---\nmodel-index: [{name: x, results: [{source: abc, metrics: []}]}]\n---\n",
    "merges": "---\nlicense: mit\nlanguage:\n - &a0 {k: 1}\n"
    + "".join(f" - &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
    + "---\n",
    "no bool": "---\nlicense: !!bool maybe\n---\n",
    "no number": "---\nlicense: mit\nlanguage: !!int ''\n---\n",
    "no time": "---\nlicense: !!timestamp foo\n---\n",
}
RESULTS = "".join(f"  - {{type: STS, metrics: [{{type: cos, value: {i}.5}}]}}\n" for i in range(4_000))
GOOD_CARDS = {
    "results of benchmarks": f"---\nmodel-index:\n{RESULTS}license: mit\n---\n",
    "quotes and a comment": "---\n'license':\n# as the base model\n  mit\ntags: [x\n---\n",
    "an alias": "---\nlicense: &l mit\nlicense_name: *l\n---\n",
}


@pytest.mark.parametrize("card", CARDS)
def test_a_card_that_is_none_is_left_out(card: str, desk: Desk) -> None:
    raw("model/README.md", CARDS[card])(desk.place)
    started = time.monotonic()
    text = (desk.compiles() / "README.md").read_text()
    assert "license: unknown" in text
    assert time.monotonic() - started < 60  # merges took days


@pytest.mark.parametrize("card", GOOD_CARDS)
def test_a_card_of_any_usual_size_names_the_licence(card: str, desk: Desk) -> None:
    raw("model/README.md", GOOD_CARDS[card])(desk.place)
    assert "\nlicense: mit\n" in (desk.compiles() / "README.md").read_text()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "notes.txt"])
def test_a_link_to_nowhere_that_nothing_reads_does_no_harm(name: str, desk: Desk) -> None:
    link(f"model/{name}")(desk.place)
    assert desk.compiles().is_dir()


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("name", "/layers.99/x", ""),
        ("name", f"/layers.{'9' * 5000}/x", ""),
        ("op_type", "[/x]", "[/x]"),
    ],
)
def test_names_in_a_graph_are_shown_as_they_are(field: str, value: str, shown: str, desk: Desk) -> None:
    graph(lambda model: setattr(model.graph.node[0], field, value))(desk.place)
    result = command.run("inspect", desk.older, "--ops")
    assert result.code == 0
    assert shown in result.out
