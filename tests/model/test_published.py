"""Masks from what the authors' published code writes: both forms made here, by the description of their layout."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from command import assert_refused, run
from damage import DAMAGED_PICKLES
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from dispc.evaluate.perplexity import ArtifactScorer, TorchScorer, logits_of
from dispc.learn.published import import_published
from dispc.masks import SETS, Masks, set_widths
from dispc.support.errors import MasksError

CONFIG = harness.checkpoint("llama").config
WIDTHS = set_widths(CONFIG)


def hypernetwork_state(prefix: str = "") -> tuple[dict[str, torch.Tensor], list[np.ndarray]]:
    """A state as the published code saves it, and the gates that have even odds or better, worked out step by step."""
    torch.manual_seed(0)
    gru, norm = nn.GRU(32, 64, bidirectional=True), nn.LayerNorm(128)
    heads = nn.ModuleList(nn.Linear(128, width, bias=False) for width in WIDTHS)
    for head in heads:
        nn.init.normal_(head.weight, std=0.5)  # type: ignore[arg-type]
    inputs = torch.randn(len(WIDTHS), 1, 32)
    with torch.no_grad():
        out, _ = gru(inputs, torch.zeros(2, 1, 64))
        latents = [head(functional.gelu(norm(out[i, :]))).squeeze() for i, head in enumerate(heads)]
    draws = -torch.log(-torch.log(torch.rand(20_001, generator=torch.Generator().manual_seed(1), dtype=torch.float64)))
    median = draws.median()
    gates = [(latent + median + 3.0 > 0).numpy() for latent in latents]
    parts = {"bi_GRU": gru, "ln_tp": norm, "linear_list_tp": heads}
    state = {
        f"{prefix}{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()
    }
    return state | {f"{prefix}inputs": inputs}, gates


def vectors_of(masks: Masks) -> list[np.ndarray]:
    found = []
    for block in masks.blocks:
        for name in SETS:
            width = CONFIG.intermediate_size if name == "mlp.mid" else CONFIG.hidden_size
            vector = np.zeros(width, dtype=bool)
            vector[block.sets()[name]] = True
            found.append(vector)
    return found


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_hypernetwork_checkpoint_gives_the_likelier_gates(tmp_path: Path, prefix: str) -> None:
    state, gates = hypernetwork_state(prefix)
    torch.save(state, tmp_path / "hn-ckpt-final-0.50.pt")
    found = vectors_of(import_published(tmp_path / "hn-ckpt-final-0.50.pt", CONFIG))
    wrong = sum(int((ours != theirs).sum()) for ours, theirs in zip(found, gates, strict=True))
    total = sum(int(gate.sum()) for gate in gates)
    assert 0.2 * sum(WIDTHS) < total < 0.999 * sum(WIDTHS)  # both values occur
    assert wrong <= 0.005 * sum(WIDTHS)  # the drawn median is off by a little


def write_model(directory: Path, vectors: list[list[float]], extra: str = "") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "modeling_llama_pruned.py").write_text(
        f"import torch\n{extra}\nclass LlamaModel:\n    def __init__(self, config):\n        self.cfgs = {vectors}\n"
    )
    return directory


def test_a_pruned_model_directory_is_read_and_not_run(tmp_path: Path) -> None:
    masks = Masks.random(CONFIG, 0.5, 3)
    vectors = [vector.astype(float).tolist() for vector in vectors_of(masks)]
    trap = tmp_path / "trap"
    directory = write_model(tmp_path / "pruned", vectors, f"open({str(trap)!r}, 'w').write('executed')")
    assert import_published(directory, CONFIG).sha256() == masks.sha256()
    assert not trap.exists()


def write_pruned(variant: str, masks: Masks, directory: Path, trap: Path) -> Path:
    """What the published code saves: every projection sliced, the class of its modelling file named in config.json."""
    dense = harness.checkpoint(variant)
    state = load_file(dense.directory / "model.safetensors")
    for index, block in enumerate(masks.blocks):
        sets = {name: torch.from_numpy(kept) for name, kept in block.sets().items()}
        at, rows, columns = f"model.layers.{index}", {}, {}
        columns |= {f"self_attn.{name}_proj": sets["attention.read"] for name in "qkv"}
        rows["self_attn.o_proj"] = sets["attention.write"]
        rows |= {f"mlp.{name}_proj": sets["mlp.mid"] for name in ("gate", "up")}
        columns |= {f"mlp.{name}_proj": sets["mlp.read"] for name in ("gate", "up")}
        rows["mlp.down_proj"], columns["mlp.down_proj"] = sets["mlp.write"], sets["mlp.mid"]
        for name, kept in rows.items():
            for kind in ("weight", "bias"):
                if f"{at}.{name}.{kind}" in state:
                    state[f"{at}.{name}.{kind}"] = state[f"{at}.{name}.{kind}"][kept]
        for name, kept in columns.items():
            state[f"{at}.{name}.weight"] = state[f"{at}.{name}.weight"][:, kept].contiguous()
    vectors = [vector.astype(float).tolist() for vector in vectors_of(masks)]
    write_model(directory, vectors, f"open({str(trap)!r}, 'w').write('executed')")
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    config = dense.raw_config | {"auto_map": {"AutoModelForCausalLM": "modeling_llama_pruned.LlamaForCausalLM"}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def uneven_masks(variant: str) -> Masks:
    """Random sets, but one that is full, one that is empty and one of a single index."""
    config = harness.checkpoint(variant).config
    blocks = [dict(block.sets()) for block in Masks.random(config, 0.5, 3).blocks]
    blocks[0]["mlp.mid"], blocks[1]["attention.read"] = np.arange(config.intermediate_size), np.array([7])
    blocks[2]["attention.write"] = np.array([], dtype=np.int64)
    return Masks.from_indices(blocks, config)


@pytest.mark.parametrize("variant", ["llama", "llama-tied-biased"])
def test_a_pruned_model_directory_compiles_as_the_dense_model_with_its_masks(tmp_path: Path, variant: str) -> None:
    masks, trap = uneven_masks(variant), tmp_path / "trap"
    directory = write_pruned(variant, masks, tmp_path / "pruned", trap)
    outcome = run("compile", directory, "--target", "onnx-cpu", "-o", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err  # validated against the reference that is made of the narrow weights
    assert json.loads(outcome.out)["masks_sha256"] == masks.sha256()
    expected = harness.reference_logits(variant, masks)
    scorers = (
        ArtifactScorer(tmp_path / "out"),
        TorchScorer(directory),
        TorchScorer(directory, tmp_path / "out" / "masks.safetensors"),
    )
    for scorer in scorers:
        np.testing.assert_allclose(logits_of(scorer, harness.TOKENS), expected, atol=2e-4)
    assert np.abs(expected - harness.reference_logits(variant, None)).max() > 0.1
    assert run("validate", tmp_path / "out", "--reference", directory).code == 0
    says = (str(directory), "is pruned already", "dense model")
    assert_refused(directory, "learn", directory, "--method", "magnitude", "-r", "0.3", says=says)
    assert not trap.exists()


@pytest.mark.extras
def test_a_pruned_model_directory_is_inspected_and_drawn_with_its_widths(tmp_path: Path) -> None:
    masks = Masks.random(CONFIG, 0.5, 3)
    directory = write_pruned("llama", masks, tmp_path / "pruned", tmp_path / "trap")
    facts = json.loads(run("inspect", directory, "--json").out)
    assert facts["facts"]["pruned"] == f"{masks.kept_parameters(CONFIG):,} block parameters kept"
    stored = load_file(directory / "model.safetensors").values()
    assert facts["facts"]["parameters"] == f"{sum(tensor.numel() for tensor in stored):,}"
    assert facts["widths"][1]["mlp.mid"] == len(masks.blocks[1].sets()["mlp.mid"])
    assert run("inspect", directory, "--plot", tmp_path / "w.svg").code == 0
    assert "<svg" in (tmp_path / "w.svg").read_text()


def test_vectors_over_several_lines_are_read_and_those_in_a_comment_are_not(tmp_path: Path) -> None:
    masks = Masks.random(CONFIG, 0.5, 3)
    wrapped = str([vector.astype(int).tolist() for vector in vectors_of(masks)]).replace("], [", "],\n    [")
    directory = write_model(tmp_path / "pruned", wrapped, "# self.cfgs = [[1.0], [0.0]]")  # type: ignore[arg-type]
    assert import_published(directory, CONFIG).sha256() == masks.sha256()
    other = Masks.random(CONFIG, 0.5, 4)  # the file is read again when it changes
    write_model(directory, [vector.astype(float).tolist() for vector in vectors_of(other)])
    assert import_published(directory, CONFIG).sha256() == other.sha256()


def test_a_pruned_model_whose_weights_are_not_those_of_its_vectors_is_refused(tmp_path: Path) -> None:
    masks = Masks.random(CONFIG, 0.5, 3)
    directory = write_pruned("llama", masks, tmp_path / "pruned", tmp_path / "trap")
    blocks = [dict(block.sets()) for block in masks.blocks]
    blocks[1]["mlp.write"] = blocks[1]["mlp.write"][1:]
    write_model(directory, [v.astype(float).tolist() for v in vectors_of(Masks.from_indices(blocks, CONFIG))])
    says = ("model.layers.1.mlp.down_proj.weight has shape", f"keep {len(blocks[1]['mlp.write'])} of 48")
    assert_refused(tmp_path, "compile", directory, "-t", "onnx-cpu", "-o", tmp_path / "out", says=says)


@pytest.mark.parametrize("shift", [1, 3])
def test_planted_differences_change_the_masks(tmp_path: Path, shift: int) -> None:
    masks = Masks.random(CONFIG, 0.5, 3)
    vectors = [np.roll(vector, shift).astype(float).tolist() for vector in vectors_of(masks)]
    assert import_published(write_model(tmp_path / "pruned", vectors), CONFIG).sha256() != masks.sha256()


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        ([[1.0] * WIDTHS[0]], "holds 1 selection vectors"),
        ([[1.0] * (width + 1) for width in WIDTHS], "selection vector 0"),
        ([[0.5] * width for width in WIDTHS], "0 or 1"),
        ("build_vectors()", "no modeling_"),
        ("[[__import__('os').getpid()]]", "no modeling_"),
    ],
    ids=["few", "wide", "soft", "call", "code"],
)
def test_directories_that_do_not_fit_are_refused(tmp_path: Path, vectors: Any, says: str) -> None:
    with pytest.raises(MasksError, match=says):
        import_published(write_model(tmp_path / "pruned", vectors), CONFIG)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_files_that_do_not_fit_are_refused(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    state, _ = hypernetwork_state()
    with warnings.catch_warnings(action="ignore"):
        sparse, eights = torch.eye(3).to_sparse_csr(), torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)
    narrow = state | {"linear_list_tp.3.weight": torch.zeros(7, 128)}
    for name, content, says in (
        ("code.pt", {"inputs": Payload()}, "without running code"),
        ("list.pt", [1, 2], "dictionary of tensors"),
        ("other.pt", {"weight": torch.zeros(3)}, "no matrix 'inputs'"),
        ("flat.pt", {"inputs": torch.zeros(3)}, "no matrix 'inputs'"),
        ("numbered.pt", {0: torch.zeros(3)}, "dictionary of tensors"),
        ("nan.pt", state | {"ln_tp.weight": torch.full((128,), float("nan"))}, "are no numbers"),
        ("complex.pt", {"inputs": torch.eye(3) * 1j}, "plain floating-point is expected"),
        ("sparse.pt", {"inputs": sparse}, "plain floating-point is expected"),
        ("quantised.pt", {"inputs": eights}, "plain floating-point is expected"),
        ("empty.pt", {"inputs": torch.empty(3, 3, device="meta")}, "plain floating-point is expected"),
        ("narrow.pt", narrow, r"heads\.3\.weight is \(7, 128\), \(88, 128\) is expected"),
    ):
        with warnings.catch_warnings(action="ignore"):
            torch.save(content, tmp_path / name)
        with pytest.raises(MasksError, match=says):
            import_published(tmp_path / name, CONFIG)
    assert not recwarn.list


@pytest.mark.parametrize("content", [b"nonsense", *DAMAGED_PICKLES, pickle.dumps({}, protocol=4)])
def test_a_file_of_nonsense_is_one_line_without_advice_to_run_it(
    tmp_path: Path, content: bytes, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "hn.pt").write_bytes(content)
    with pytest.raises(MasksError, match=r"hn\.pt: not a checkpoint that loads without running code") as raised:
        import_published(tmp_path / "hn.pt", CONFIG)
    assert "weights_only" not in str(raised.value) and "\n" not in str(raised.value) and not recwarn.list


def test_a_literal_that_never_ends_is_looked_through_at_once(tmp_path: Path) -> None:
    (tmp_path / "modeling_pruned.py").write_text("cfgs = [" + "[1]    " * 2000 + "x")
    with pytest.raises(MasksError, match="no modeling_"):
        import_published(tmp_path, CONFIG)


def test_the_command_writes_the_mask_file(tmp_path: Path) -> None:
    masks = Masks.random(CONFIG, 0.5, 3)
    vectors = [vector.astype(float).tolist() for vector in vectors_of(masks)]
    directory, model = write_model(tmp_path / "pruned", vectors), harness.checkpoint("llama").directory
    arguments = ("import-masks", directory, "--model", model, "-o", tmp_path / "new" / "m.safetensors")
    assert run(*arguments).code == 0
    written = Masks.load(tmp_path / "new" / "m.safetensors")
    assert written.sha256() == masks.sha256()
    assert int(written.metadata["kept_parameters"]) == masks.kept_parameters(CONFIG)
    assert run(*arguments).code == 2  # it exists
    for source, what in ((tmp_path / "pruned" / "x.json", "{}"), (tmp_path / "hn.pt", "")):
        source.write_text(what)
        assert_refused(tmp_path, *arguments[:-1], source, "--force", says=(str(source), "is no mask file"))
