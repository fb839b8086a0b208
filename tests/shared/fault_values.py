"""Faults in what a graph stores: weights, biases, norms and index lists of a sub-layer."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from fault_places import NORMS, Array, NotHere, Place, initializers, nodes, one, spoil, stored

INDICES = (ir.DataType.INT32, ir.DataType.INT64)


def weight(change: Callable[[Array, np.random.Generator], Array | None]) -> Callable[[ir.Model, Place], None]:
    """Change the float weight [K,N] of one projection."""

    def plant(model: ir.Model, place: Place) -> None:
        value = one(initializers(model, place, "MatMul", position=1), place)
        spoil(value, lambda w: change(w, place.rng))

    return plant


def heavy(w: Array, axis: int, rng: np.random.Generator) -> int:
    """A row or column that is not all zeros: padding is."""
    return int(rng.choice(np.flatnonzero(np.abs(w).max(axis=1 - axis) > 0)))


def zero_column(w: Array, rng: np.random.Generator) -> None:
    w[:, heavy(w, 1, rng)] = 0


def zero_row(w: Array, rng: np.random.Generator) -> None:
    w[heavy(w, 0, rng)] = 0


def scale_column(w: Array, rng: np.random.Generator) -> None:
    w[:, heavy(w, 1, rng)] *= np.asarray(1.01, w.dtype)


def flip_column(w: Array, rng: np.random.Generator) -> None:
    w[:, heavy(w, 1, rng)] *= -1


def swap_rows(w: Array, rng: np.random.Generator) -> None:
    i = heavy(w, 0, rng)
    j = (i + 1) % len(w)
    w[[i, j]] = w[[j, i]]


def swap_columns(w: Array, rng: np.random.Generator) -> None:
    i = heavy(w, 1, rng)
    j = (i + 1) % w.shape[1]
    w[:, [i, j]] = w[:, [j, i]]


def one_element(w: Array, rng: np.random.Generator) -> None:
    i, j = heavy(w, 0, rng), heavy(w, 1, rng)
    w[i, j] += np.asarray(0.5 * np.abs(w).max(), w.dtype)


def stretch(w: Array, rng: np.random.Generator, by: float = 1.01) -> None:
    """Before a norm this hardly changes what is computed."""
    w *= np.asarray(by, w.dtype)


def low_precision(w: Array, rng: np.random.Generator) -> Array:
    """As if the weight had gone through a narrower type."""
    kept = np.float32(w).view(np.uint32) & np.uint32(0xFFFF0000 if w.dtype == np.float32 else 0xFFFE0000)
    return kept.view(np.float32).astype(w.dtype)


def quantised(position: int, change: Callable[[Array, np.random.Generator], None]) -> Callable[[ir.Model, Place], None]:
    def plant(model: ir.Model, place: Place) -> None:
        spoil(one(initializers(model, place, "MatMulNBits", position=position), place), lambda w: change(w, place.rng))

    return plant


def zero_scale(scales: Array, rng: np.random.Generator) -> None:
    scales.reshape(-1)[rng.choice(np.flatnonzero(scales.reshape(-1)))] = 0


def other_integers(packed: Array, rng: np.random.Generator) -> None:
    flat = packed.reshape(-1, packed.shape[-1])
    flat[rng.integers(len(flat))] ^= 0x77


def bias(change: Callable[[Array, np.random.Generator], None]) -> Callable[[ir.Model, Place], None]:
    def plant(model: ir.Model, place: Place) -> None:
        found = [
            value
            for node in nodes(model, place, "Add")
            for value in node.inputs
            if value is not None and value.const_value is not None and len(value.const_value.shape) == 1
        ]
        spoil(one(found, place), lambda b: change(b, place.rng))

    return plant


def zero(b: Array, rng: np.random.Generator) -> None:
    b[:] = 0


def shift_one(b: Array, rng: np.random.Generator) -> None:
    b[rng.choice(np.flatnonzero(b)) if b.any() else 0] += np.asarray(0.3, b.dtype)


def norm(model: ir.Model, place: Place, name: str) -> None:
    node = one(nodes(model, place, *NORMS), place)
    if name == "epsilon":
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.05)
        return
    skipped = node.op_type.startswith("Skip")
    position = (2 if skipped else 1) + (name == "bias")
    read = read_indices(model, place)
    value = stored(node, position)

    def change(w: Array) -> None:
        inside = read[read < len(w)]  # norms of a head are narrower
        if len(inside):
            w[inside[len(inside) // 2]] += np.asarray(0.25, w.dtype)

    spoil(value, change)


def read_indices(model: ir.Model, place: Place) -> Array:
    gathers = [node for node in nodes(model, place, "Gather", "ArrayFeatureExtractor") if "/read/" in (node.name or "")]
    if not gathers:
        return np.arange(4)
    tensor = stored(gathers[0], 1).const_value
    assert tensor is not None
    return tensor.numpy().reshape(-1)


def indices(part: str, change: Callable[[Array, int, np.random.Generator], None]) -> Callable[[ir.Model, Place], None]:
    """Change the index list of the read or of the write; `change` gets the width of what is indexed too."""

    def plant(model: ir.Model, place: Place) -> None:
        found = [
            value
            for node in nodes(model, place, "Gather", "ArrayFeatureExtractor", "ScatterND", "ScatterElements")
            if f"/{part}/" in (node.name or "")
            for value in node.inputs
            if value is not None and value.const_value is not None and value.dtype in INDICES
        ]
        value = one(found, place)

        def spoiled(a: Array) -> Array:
            flat = a.reshape(-1)
            change(flat, int(flat.max()) + 1, place.rng)
            return flat.reshape(a.shape)

        spoil(value, spoiled)

    return plant


def swap_indices(a: Array, width: int, rng: np.random.Generator) -> None:
    different = np.flatnonzero(a != a[0])
    if not len(different):
        raise NotHere
    other = int(rng.choice(different))
    a[[0, other]] = a[[other, 0]]


def another_index(a: Array, width: int, rng: np.random.Generator) -> None:
    """One that the list does not have; in a list that has them all, one of the others."""
    place = rng.integers(len(a))
    others = np.setdiff1d(np.arange(width), a)
    others = others if len(others) else np.setdiff1d(a, a[place])
    if not len(others):
        raise NotHere
    a[place] = rng.choice(others)


def roll_indices(a: Array, width: int, rng: np.random.Generator) -> None:
    a[:] = np.roll(a, 1)
