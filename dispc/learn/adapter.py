"""Low-rank adapters on all projections: made by peft for recovery, merged into a checkpoint's weights without it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dispc.model.config import DecoderConfig
from dispc.support.errors import CheckpointError, first_line
from dispc.support.extras import need

ADAPTER = "default"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""What peft puts before the names of modules."""
SCALE = 2.0
"""What the product of an adapter's two matrices is multiplied with (peft: lora_alpha / r)."""


def projections(config: DecoderConfig) -> list[str]:
    """Module names, relative to a block, of all projections."""
    family = config.family
    return [*family.attention_reads, family.attention_out, *family.mlp_reads, family.down]


def add_adapters(model: Any, config: DecoderConfig, rank: int) -> Any:
    """Put an adapter of this rank, in float32, around every projection of `model`, in place; peft's model around it.

    Only the adapters are trained. The parameters are on the meta device, and stay there; `first_values` are theirs.
    """
    need("peft", "learn")
    from peft import LoraConfig, PeftModel

    names = [name.rsplit(".", 1)[-1] for name in projections(config)]
    settings = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=sorted(set(names)))
    wrapped = PeftModel(model, settings, ADAPTER)
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.float()
    return wrapped


def first_values(name: str, shape: tuple[int, ...], seed: int) -> Tensor | None:
    """What an adapter's matrix begins with, None for any other parameter: the model computes what it did.

    As in peft, the first is uniform up to 1 / sqrt(inputs), here by `seed` and name, and the second zero.
    """
    if f".lora_B.{ADAPTER}." in name:
        return torch.zeros(shape)
    if f".lora_A.{ADAPTER}." not in name:
        return None
    drawn = np.random.default_rng((seed, *name.encode())).uniform(-1, 1, shape) / math.sqrt(shape[1])
    return torch.from_numpy(drawn).float()


def unwrapped(name: str) -> str:
    """The name of a projection's parameter in a model without adapters."""
    return name.replace(".base_layer.", ".")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of `model` by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(weights: Mapping[str, Tensor], settings: Any, folder: Path) -> None:
    """Write the adapters among the `weights` of a model in float16, with peft's `settings`: a directory peft loads."""
    folder.mkdir(parents=True)
    adapters = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    halves = {
        PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.half().contiguous() for name, tensor in adapters.items()
    }
    save_file(halves, folder / WEIGHTS, metadata={"format": "pt"})
    settings.save_pretrained(str(folder))


def merge_adapter(model: nn.Module, folder: Path) -> None:
    """Add the adapters in `folder` to the weights of `model`, in place, without peft.

    Raises:
        CheckpointError: when the files are no adapters, or those of another model.
    """
    try:
        settings: Mapping[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        scale = settings["lora_alpha"] / settings["r"]
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, down in tensors.items():
            if name.endswith(".lora_A.weight"):
                up = tensors[name.replace(".lora_A.", ".lora_B.")]
                weight = model.get_parameter(f"{name.removeprefix(PREFIX).removesuffix('.lora_A.weight')}.weight")
                weight.data += _change(scale, up, down).to(weight)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: no adapter of this model ({first_line(error)})") from error


def without_adapter(name: str, weights: Mapping[str, Tensor], settings: Any) -> Tensor:
    """The weight called `name` in a model without adapters, float32: of trained `weights`, by peft's `settings`."""
    if name in weights:
        return weights[name].float()
    module, _, kind = name.rpartition(".")
    base = weights[f"{module}.base_layer.{kind}"].float()
    down = weights.get(f"{module}.lora_A.{ADAPTER}.weight")
    if kind != "weight" or down is None:
        return base
    return base + _change(settings.lora_alpha / settings.r, weights[f"{module}.lora_B.{ADAPTER}.weight"], down)


def _change(scale: float, up: Tensor, down: Tensor) -> Tensor:
    """What an adapter's two matrices [out, rank], [rank, in] add to a weight, float32 [out, in]."""
    return scale * (up.float() @ down.float())
