"""No command runs code that a model directory carries, or takes it from elsewhere because a file says so."""

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import harness
import language
import pytest
import tiny
import torch
from fuzzing import LEARN

from dispc.masks import Masks

BAIT = "from pathlib import Path\nPath({mark!r}).touch()\n"
"""Run, it leaves a mark."""


class Payload:
    """Pickled, it leaves a mark where a loader executes pickles."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def code(model: Path, mark: Path, *names: str) -> None:
    for name in names:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(BAIT.format(mark=str(mark)))


def generation_code(model: Path, mark: Path) -> None:
    code(model, mark, "custom_generate/generate.py")
    edit(model / "generation_config.json", custom_generate="custom_generate")


def config_code(model: Path, mark: Path) -> None:
    code(model, mark, "evil.py")
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    edit(model / "config.json", auto_map={name: f"evil.{name}" for name in names})


def tokenizer_code(model: Path, mark: Path) -> None:
    code(model, mark, "tokenization_evil.py")
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.A", "tokenization_evil.B"]})


def tokenizer_class_of_ours(model: Path, mark: Path) -> None:
    code(model, mark, "tokenization_evil.py")
    edit(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer")


def kernel(model: Path, mark: Path) -> None:
    code(model, mark, "kernel/__init__.py", "build/torch-universal/kernel/__init__.py")
    edit(
        model / "config.json",
        _attn_implementation=f"{model}:kernel",
        attn_implementation="someone/kernel",
        _attn_implementation_internal="someone/kernel",
        use_kernels=False,
    )


def pickled_weights(model: Path, mark: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(1), "x": Payload(mark)}, model / "pytorch_model.bin")


def pickles_beside(model: Path, mark: Path) -> None:
    for name in ("training_args.bin", "vocab.pkl", "optimizer.pt", "pytorch_model.bin"):
        (model / name).write_bytes(pickle.dumps(Payload(mark)))


def pickling_tokenizer(model: Path, mark: Path) -> None:
    """transformers knows tokenizers whose vocabulary is a pickle."""
    (model / "vocab.pkl").write_bytes(pickle.dumps(Payload(mark)))
    edit(model / "tokenizer_config.json", tokenizer_class="TransfoXLTokenizer")


def published_code(model: Path, mark: Path) -> None:
    code(model, mark, "modeling_llama_pruned.py")
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_llama_pruned.Llama"})


def template(text: str) -> Callable[[Path, Path], None]:
    def put(model: Path, mark: Path) -> None:
        edit(model / "tokenizer_config.json", chat_template=text.replace("MARK", str(mark)))
        (model / "chat_template.jinja").write_text(text.replace("MARK", str(mark)))

    return put


def tokenizer_json(**changes: Any) -> Callable[[Path, Path], None]:
    return lambda model, mark: edit(model / "tokenizer.json", **changes)


def class_in_config(model: Path, mark: Path) -> None:
    """Where tokenizer_config.json names no class, config.json may."""
    (model / "vocab.pkl").write_bytes(pickle.dumps(Payload(mark)))
    told = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in told.items() if k != "tokenizer_class"}))
    edit(model / "config.json", tokenizer_class="TransfoXLTokenizer")


def files_elsewhere(model: Path, mark: Path) -> None:
    edit(model / "tokenizer_config.json", tokenizer_file="/etc/passwd", fast_tokenizer_files=["../tokenizer.9.json"])


def replacing(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


CARRIERS: dict[str, Callable[[Path, Path], None]] = {
    "custom_generate": generation_code,
    "auto_map of config": config_code,
    "auto_map of tokenizer": tokenizer_code,
    "tokenizer class": tokenizer_class_of_ours,
    "kernels": kernel,
    "pickled weights": pickled_weights,
    "pickles beside": pickles_beside,
    "pickling tokenizer": pickling_tokenizer,
    "tokenizer class in config": class_in_config,
    "tokenizer files elsewhere": files_elsewhere,
    "normaliser that grows": tokenizer_json(
        normalizer={"type": "Sequence", "normalizers": [replacing(".", "a" * 10)] * 9}
    ),
    "normaliser that backtracks": tokenizer_json(normalizer=replacing("(([a-z ]+)+)+$|(a|a)*b", "x")),
    "normaliser that panics": tokenizer_json(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAAAAACAAQAAgMz8AgC4BQAA"}
    ),
    "published code": published_code,
    "template that calls": template(
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}{{ ''.__class__.__mro__[1].__subclasses__() }}"
    ),
    "template that reads": template("{% include '/etc/hostname' %}{{ open('/etc/hostname').read() }}"),
    "template that loops": template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    "template that counts": template("{{ 9 ** 9 ** 9 }}"),
    "template that grows": template("{{ 'a' * 99999999999 }}"),
}

COMMANDS: dict[str, tuple[str, ...]] = {
    "compile": ("compile", "model", "-t", "onnx-cpu", "-o", "new", "--no-validate"),
    "validate": ("validate", "out", "-r", "model"),
    "eval": ("eval", "model", "--data", "text.txt", "--sequence-length", "16", "--max-windows", "1"),
    "learn": LEARN,
    "learn activation": (
        "learn",
        "model",
        "--method",
        "activation",
        "-r",
        "0.3",
        "--data",
        "text.txt",
        "--sequence-length",
        "16",
        "-o",
        "new.safetensors",
    ),
    "import-masks": ("import-masks", "model", "--model", "model", "-o", "new.safetensors"),
    "inspect": ("inspect", "model"),
    "generate": ("generate", "carrier", "the sea", "--max-new-tokens", "1"),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is a student of nothing, an artifact of it, and a text."""
    place = tmp_path_factory.mktemp("carriers")
    model = tiny.make_model("llama", place / "model")
    language.make_tokenizer(model, "{{ messages[0].content }}")
    config = harness.checkpoint("llama").config
    Masks.random(config, 0.3, 1).save(model / "masks.safetensors", config)
    outcome = command.run("compile", model, "-t", "onnx-cpu", "-o", place / "out", "--no-validate")
    assert outcome.code == 0, outcome
    (place / "text.txt").write_text(language.make_text(30, 4))
    return place


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_code_in_a_model_directory_is_never_run(
    carrier: str, name: str, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is right, or it is one line; and it comes soon."""
    if name != "generate" and carrier.startswith("template"):
        pytest.skip("only generate applies templates")
    place, mark = tmp_path / "place", tmp_path / "mark"
    shutil.copytree(originals, place)
    monkeypatch.chdir(place)
    if name == "generate":  # an artifact has a copy of everything in it
        shutil.copytree("out", "carrier")
        shutil.copy("model/model.safetensors", "carrier/model.safetensors")
        CARRIERS[carrier](Path("carrier"), mark)
    else:
        CARRIERS[carrier](Path("model"), mark)
    started = time.monotonic()
    outcome = command.run(*COMMANDS[name])
    assert not mark.exists()
    assert time.monotonic() - started < 120
    # The artifact was compiled before: `validate` finds that the files beside its reference changed.
    assert outcome.code in ((0, 1, 2) if name == "validate" else (0, 2)), outcome
    if outcome.code == 2:
        assert len(outcome.err.splitlines()) == 1, outcome.err
        assert outcome.err.startswith("error: ") and "unexpected" not in outcome.err
