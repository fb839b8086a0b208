"""Write a random bfloat16 checkpoint of a named shape: config.json and sharded safetensors with their index.

    .venv/bin/python benchmarks/make_checkpoint.py DIR --shape llama-2-7b
    .venv/bin/python benchmarks/make_checkpoint.py DIR --shape llama-2-7b --layers 80 --sparse

The first writes 13.5 GB as fast as the disk allows; the second writes headers only, and holes instead of values. All
tensors are copied from one block of normal numbers (standard deviation 0.02), each from a random offset: all values are
finite, and memory stays below 300 MB for any shape.
"""

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import typer
from common import GIB, console
from shapes import SHAPES

Words = npt.NDArray[np.uint16]
BLOCK = 16 * 2**20 + 4099
"""Numbers in the random block; not a power of two, so that rows of a tensor do not repeat."""
SHARD_BYTES = 5 * 10**9


def make_checkpoint(
    directory: Path,
    shape: str,
    *,
    layers: int | None = None,
    sparse: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the checkpoint; returns the bytes of its tensors. `sparse` leaves holes where values would be."""
    sizes = SHAPES[shape] if layers is None else replace(SHAPES[shape], layers=layers)
    directory.mkdir(parents=True, exist_ok=True)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, dimensions in sizes.tensors().items():
        size = 2 * int(np.prod(dimensions))
        if groups[-1] and filled + size > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = dimensions
        filled += size

    source = np.zeros(0, np.uint16) if sparse else _random_block()
    rng = np.random.default_rng(1)
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, start=1):
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(group, file_name)
        with (directory / file_name).open("wb") as file:
            total += _write_shard(file, group, source, rng)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    # Last, so that a directory with config.json is a complete one.
    (directory / "config.json").write_text(json.dumps(sizes.config(), indent=2) + "\n")
    return total


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of three words, for programs that refuse a checkpoint without one."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


def _write_shard(file: BinaryIO, tensors: dict[str, tuple[int, ...]], source: Words, rng: np.random.Generator) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dimensions in tensors.items():
        start, end = end, end + 2 * int(np.prod(dimensions))
        header[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    if not len(source):
        file.truncate(8 + len(encoded) + end)
        return end
    ones = np.full(max(64, *(d[0] for d in tensors.values())), 0x3F80, np.uint16)  # bfloat16 1.0
    for name, dimensions in tensors.items():
        block, at = (ones, 0) if "norm" in name else (source, int(rng.integers(len(source))))
        left = int(np.prod(dimensions))
        while left:
            piece = block[at : at + left]
            file.write(piece.data)
            left, at = left - len(piece), 0
    return end


def _random_block() -> Words:
    values = np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16 is the upper half of float32


def main(
    directory: Annotated[Path, typer.Argument(help="Where the checkpoint goes.")],
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "llama-2-7b",
    layers: Annotated[int | None, typer.Option(help="Number of blocks, instead of the shape's.")] = None,
    sparse: Annotated[bool, typer.Option(help="Write headers only, holes for values.")] = False,
    shard_bytes: Annotated[int, typer.Option(help="Largest shard.")] = SHARD_BYTES,
) -> None:
    """Write a random bfloat16 checkpoint."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape}; shapes are {', '.join(SHAPES)}")
    total = make_checkpoint(directory, shape, layers=layers, sparse=sparse, shard_bytes=shard_bytes)
    os.sync()
    console.print(f"{directory}: {total / 10**9:.1f} GB ({total / GIB:.2f} GiB){' as holes' if sparse else ''}")


if __name__ == "__main__":
    typer.run(main)
