"""Write a random bfloat16 checkpoint of a named shape: config.json and sharded safetensors with their index.

    .venv/bin/python benchmarks/make_checkpoint.py DIR --shape llama-2-7b              # 13.5 GB, as fast as the disk
    .venv/bin/python benchmarks/make_checkpoint.py DIR --shape llama-2-7b --layers 80 --sparse   # headers, and holes

One block of normal numbers (standard deviation 0.02) is made once, and every tensor is written from it, starting at an
offset of its own: all values are finite, memory stays below 200 MB whatever the shape.
"""

import json
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import typer
from common import GIB, console

BLOCK = 16 * 2**20 + 4099
"""Numbers in the random block; the odd rest keeps rows of power-of-two tensors from repeating."""
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a LLaMA-like model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    tied: bool = False

    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every parameter, in the order of the model."""
        hidden, kv = self.hidden, self.kv_heads * self.hidden // self.heads
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (self.intermediate, hidden),
            "mlp.up_proj": (self.intermediate, hidden),
            "mlp.down_proj": (hidden, self.intermediate),
        }
        parts: dict[str, tuple[int, ...]] = {"model.embed_tokens": (self.vocabulary, hidden)}
        parts |= {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()}
        parts["model.norm"] = (hidden,)
        if not self.tied:
            parts["lm_head"] = (self.vocabulary, hidden)
        return {f"{name}.weight": shape for name, shape in parts.items()}


SHAPES = {
    "tiny": Shape(hidden=64, intermediate=176, layers=4, heads=4, kv_heads=2, vocabulary=512, positions=256),
    "smollm2-135m": Shape(
        hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocabulary=49152, positions=8192, tied=True
    ),
    "llama-2-7b": Shape(
        hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, vocabulary=32000, positions=4096
    ),
    "llama-2-13b": Shape(
        hidden=5120, intermediate=13824, layers=40, heads=40, kv_heads=40, vocabulary=32000, positions=4096
    ),
}


def make_checkpoint(
    directory: Path, shape: str, *, layers: int | None = None, sparse: bool = False, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write the checkpoint; returns the bytes of its tensors. `sparse` leaves holes (zeros) where values would be."""
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


def _write_shard(
    file: BinaryIO, tensors: dict[str, tuple[int, ...]], source: np.ndarray[Any, np.dtype[np.uint16]], rng: Any
) -> int:
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
            file.write(memoryview(piece).cast("B"))
            left, at = left - len(piece), 0
    return end


def _random_block() -> np.ndarray[Any, np.dtype[np.uint16]]:
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
