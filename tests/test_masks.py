"""Masks: what a file holds comes back, figures count what they say, and no malformed file gets through."""

import errno
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
from command import fingerprint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dispc.masks import SETS, Masks, set_width
from dispc.model.config import DecoderConfig
from dispc.support.errors import MasksError

CONFIG: DecoderConfig = harness.checkpoint("llama").config
SCOPES = ("full", "selected")


def lists(name: str) -> st.SearchStrategy[list[int]]:
    width = set_width(name, CONFIG.hidden_size, CONFIG.intermediate_size)
    whole = st.just(list(range(width)))
    return st.sampled_from([[], [0], [width - 1]]) | whole | st.sets(st.integers(0, width - 1)).map(list)


blocks = st.lists(
    st.fixed_dictionaries({}, optional={name: lists(name) for name in SETS}),
    min_size=CONFIG.num_hidden_layers,
    max_size=CONFIG.num_hidden_layers,
)


@st.composite
def masks(draw: st.DrawFn) -> Masks:
    scope: Any = draw(st.sampled_from(SCOPES))
    metadata = draw(st.dictionaries(st.sampled_from(["method", "data", "note"]), st.text(max_size=9)))
    return Masks.from_indices(draw(blocks), CONFIG, norm_scope=scope, metadata=metadata)


def saved(path: Path, **changes: str | None) -> Path:
    """A good mask file with entries of its metadata changed, or removed where None."""
    Masks.random(CONFIG, 0.5, 1).save(path, CONFIG)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() | changes
    save_file(load_file(path), path, {key: value for key, value in metadata.items() if value is not None})
    return path


def retensored(path: Path, **changes: Any) -> Path:
    """A good mask file with tensors replaced, added, or removed where None (`__` stands for a dot)."""
    saved(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = load_file(path) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, path, metadata)
    return path


@given(masks())
def test_a_file_gives_back_the_sets_the_scope_and_the_metadata(before: Masks) -> None:
    path = harness.scratch() / "round-trip.safetensors"
    before.save(path, CONFIG)
    after = Masks.load(path)
    after.check(CONFIG)
    assert after.sha256() == before.sha256()
    assert after.norm_scope == before.norm_scope
    assert before.metadata.items() <= after.metadata.items()
    for one, other in zip(before.blocks, after.blocks, strict=True):
        for name, indices in one.sets().items():
            assert other.sets()[name].dtype == np.int64
            np.testing.assert_array_equal(other.sets()[name], indices)


@given(masks())
def test_the_same_masks_make_the_same_bytes(made: Masks) -> None:
    paths = [harness.scratch() / f"same-{i}.safetensors" for i in range(2)]
    for path in paths:
        made.save(path, CONFIG)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    Masks.load(paths[0]).save(paths[1], CONFIG)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@given(blocks)
def test_sets_are_sorted_unique_and_those_that_were_given(given_blocks: list[dict[str, list[int]]]) -> None:
    made = Masks.from_indices(given_blocks, CONFIG)
    for given_sets, block in zip(given_blocks, made.blocks, strict=True):
        for name, indices in block.sets().items():
            width = set_width(name, CONFIG.hidden_size, CONFIG.intermediate_size)
            assert indices.tolist() == sorted(given_sets.get(name, range(width)))


@given(blocks)
def test_kept_parameters_count_the_weights_that_no_mask_zeroes(
    given_blocks: list[dict[str, list[int]]],
) -> None:
    made = Masks.from_indices(given_blocks, CONFIG)
    kept = 0
    for block in made.blocks:
        size = {name: len(indices) for name, indices in block.sets().items()}
        query, key_value = CONFIG.query_size, CONFIG.key_value_size
        if size["attention.read"] and size["attention.write"]:
            kept += size["attention.read"] * (query + 2 * key_value) + size["attention.write"] * query
        if size["mlp.read"] and size["mlp.mid"] and size["mlp.write"]:
            kept += size["mlp.mid"] * (2 * size["mlp.read"] + size["mlp.write"])
    assert made.kept_parameters(CONFIG) == kept


def test_dense_masks_keep_everything() -> None:
    total = CONFIG.block_parameters * CONFIG.num_hidden_layers
    assert Masks.dense(CONFIG).kept_parameters(CONFIG) == total


@given(masks(), st.data())
def test_the_digest_changes_with_any_index_and_with_the_scope_only(before: Masks, data: st.DataObject) -> None:
    sets = [block.sets() for block in before.blocks]
    scope: Any = before.norm_scope
    assert Masks.from_indices(sets, CONFIG, norm_scope=scope, metadata={"note": "x"}).sha256() == before.sha256()
    other: Any = SCOPES[1 - SCOPES.index(scope)]
    assert Masks.from_indices(sets, CONFIG, norm_scope=other).sha256() != before.sha256()
    chosen = data.draw(st.sampled_from(sets))
    name = data.draw(st.sampled_from(SETS))
    index = data.draw(st.integers(0, set_width(name, CONFIG.hidden_size, CONFIG.intermediate_size) - 1))
    chosen[name] = np.setxor1d(chosen[name], [index])
    changed = Masks.from_indices(sets, CONFIG, norm_scope=scope).sha256()
    assert changed != before.sha256()
    width = set_width(name, CONFIG.hidden_size, CONFIG.intermediate_size)
    if 0 < len(chosen[name]) < width:  # one index for another, at the same width
        missing = np.setdiff1d(np.arange(width), chosen[name])
        chosen[name] = np.append(chosen[name][1:], missing[0])
        assert Masks.from_indices(sets, CONFIG, norm_scope=scope).sha256() != changed


@given(st.floats(0.0, 0.95), st.integers(0, 1000))
def test_random_masks_prune_about_the_ratio_leave_no_set_empty_and_follow_the_seed(ratio: float, seed: int) -> None:
    made = Masks.random(CONFIG, ratio, seed)
    kept = made.kept_parameters(CONFIG) / (CONFIG.block_parameters * CONFIG.num_hidden_layers)
    assert abs(kept - (1 - ratio)) < 0.3
    assert all(len(indices) for block in made.blocks for indices in block.sets().values())
    assert made.sha256() == Masks.random(CONFIG, ratio, seed).sha256()
    if ratio > 0.1:
        assert made.sha256() != Masks.random(CONFIG, ratio, seed + 1).sha256()


@pytest.mark.parametrize("name", SETS)
def test_a_sub_layer_dies_with_any_of_its_sets(name: str) -> None:
    block = Masks.from_indices([{name: []}, {}, {}], CONFIG).blocks[0]
    assert (block.attention.alive, block.mlp.alive) == ("mlp" in name, "attention" in name)


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ({"mlp.middle": [0]}, "block 0: unknown set 'mlp.middle'"),
        ({"mlp.mid": [3, 3]}, "block 0, mlp.mid: an index occurs twice"),
        ({"mlp.mid": [88]}, "block 0, mlp.mid: an index lies outside 0..87"),
        ({"attention.read": [-1]}, "block 0, attention.read: an index lies outside 0..47"),
    ],
)
def test_wrong_index_lists_are_refused_with_their_place(first: dict[str, list[int]], reason: str) -> None:
    with pytest.raises(MasksError) as refusal:
        Masks.from_indices([first, {}, {}], CONFIG)
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("variant", "difference"),
    [("qwen2", "model_type is llama, the model has qwen2"), ("phi", "model_type"), ("opt", "model_type")],
)
def test_masks_of_another_model_are_refused_with_the_first_difference(variant: str, difference: str) -> None:
    made = Masks.load(saved(harness.scratch() / "other.safetensors"))
    with pytest.raises(MasksError, match=difference):
        made.check(harness.checkpoint(variant).config)


def test_masks_of_another_depth_or_width_are_refused_with_both_numbers() -> None:
    with pytest.raises(MasksError, match="num_hidden_layers is 2, the model has 3"):
        Masks.from_indices([{}, {}], CONFIG)
    wide = Masks.dense(CONFIG)
    object.__setattr__(wide, "hidden_size", 64)
    with pytest.raises(MasksError, match="hidden_size is 64, the model has 48"):
        wide.check(CONFIG)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "other"}, "not a mask file"),
        ({"format": None}, "not a mask file"),
        ({"version": "2"}, "mask format version 2; this dispc reads 1"),
        ({"norm_scope": "both"}, "norm_scope 'both'"),
        ({"norm_scope": None}, "norm_scope"),
        ({"hidden_size": "many"}, "many"),
        ({"hidden_size": "-1"}, "hidden_size"),
        ({"num_hidden_layers": "0"}, "num_hidden_layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"model_type": None}, "model_type"),
        ({"num_hidden_layers": "4"}, "tensor blocks.3.attention.read is missing"),
        ({"num_hidden_layers": "2"}, "unexpected tensor blocks.2.attention.read"),
        ({"intermediate_size": "87"}, "blocks.0.mlp.mid must be 87 uint8 values 0 or 1"),
    ],
)
def test_wrong_metadata_is_refused_with_the_file_and_the_entry(
    changes: dict[str, str | None], reason: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "masks.safetensors", **changes)
    with pytest.raises(MasksError) as refusal:
        Masks.load(path)
    assert reason in str(refusal.value) and str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"blocks__1__mlp__mid": np.full(88, 2, np.uint8)},
            "blocks.1.mlp.mid must be 88 uint8 values 0 or 1",
        ),
        ({"blocks__1__mlp__mid": np.ones(88, np.int64)}, "blocks.1.mlp.mid must be"),
        ({"blocks__1__mlp__mid": np.ones((2, 44), np.uint8)}, "blocks.1.mlp.mid must be"),
        ({"blocks__1__mlp__mid": None}, "blocks.1.mlp.mid is missing"),
        ({"blocks__0__mlp__more": np.ones(88, np.uint8)}, "unexpected tensor blocks.0.mlp.more"),
    ],
)
def test_wrong_tensors_are_refused_with_the_file_and_the_tensor(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = retensored(tmp_path / "masks.safetensors", **changes)
    with pytest.raises(MasksError) as refusal:
        Masks.load(path)
    assert reason in str(refusal.value) and str(path) in str(refusal.value)


@given(st.data())
@settings(max_examples=200)
def test_a_damaged_file_is_an_error_and_never_a_crash(data: st.DataObject) -> None:
    """Cut anywhere or changed anywhere: it loads as well-formed masks, or MasksError names the file."""
    path = saved(harness.scratch() / "damaged.safetensors")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        loaded = Masks.load(path)
    except MasksError as error:
        assert str(path) in str(error)
        assert len(str(error).splitlines()) == 1
    else:
        for block in loaded.blocks:
            for name, indices in block.sets().items():
                assert len(indices) <= set_width(name, loaded.hidden_size, loaded.intermediate_size)


def test_a_file_of_tensors_that_numpy_does_not_know_is_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    save_torch({"w": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    with pytest.raises(MasksError, match=r"model\.safetensors"):
        Masks.load(tmp_path / "model.safetensors")


def test_a_save_that_fails_leaves_the_older_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "masks.safetensors")
    before = fingerprint(tmp_path)

    def full_disk(self: Path, content: bytes) -> int:
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        Masks.random(CONFIG, 0.2, 9).save(path, CONFIG)
    monkeypatch.undo()
    assert fingerprint(tmp_path) == before
