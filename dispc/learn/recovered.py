"""The directory that a recovery leaves: an ordinary Hugging Face model with zeros outside of the sets."""

import shutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dispc import __version__
from dispc.learn.adapter import ADAPTER, save_adapter
from dispc.learn.recovery_options import MARKER, RecoverOptions
from dispc.manifest import COPIED
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.reference.masked import load_reference, zero_outside
from dispc.support.directories import staged_directory
from dispc.support.files import write_json, write_text

LORA = "lora_"


def write_recovered(
    options: RecoverOptions, checkpoint: Checkpoint, masks: Masks, wrapped: Any, weights: Mapping[str, Tensor],
    outcome: Mapping[str, Any], *, force: bool,
) -> None:  # fmt: skip
    """Write `options.output`, which appears at once: configuration and tokenizer, weights, masks, README.

    `weights` are those of the trained model by name, on the CPU, with the adapters of peft's `wrapped` among them
    where there are any. Names, shapes and dtypes of the tensors are those of the checkpoint.
    """
    model = load_reference(checkpoint, None)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_merged(name, weights, wrapped))
    zero_outside(model, checkpoint.config.family, masks)
    with staged_directory(options.output, force, MARKER) as stage:
        dtypes = {tensor.dtype for tensor in checkpoint.tensors.values()}
        if len(dtypes) == 1:
            model.to(dtypes.pop())
        model.save_pretrained(str(stage))
        for name in COPIED:
            if (checkpoint.directory / name).is_file():
                shutil.copyfile(checkpoint.directory / name, stage / name)
        masks.save(stage / "masks.safetensors", checkpoint.config)
        if wrapped is not None:
            save_adapter(weights, wrapped.peft_config[ADAPTER], stage / "adapter")
        write_json(stage / MARKER, {"dispc": __version__, "options": options.as_dict()} | dict(outcome))
        write_text(stage / "README.md", readme(options, checkpoint, masks, outcome))


def _merged(name: str, weights: Mapping[str, Tensor], wrapped: Any) -> Tensor:
    """The trained weight called `name` in a model without adapters."""
    if name in weights:
        return weights[name].float()
    module, _, kind = name.rpartition(".")
    base = weights[f"{module}.base_layer.{kind}"].float()
    down = weights.get(f"{module}.{LORA}A.{ADAPTER}.weight")
    if kind != "weight" or down is None:
        return base
    settings = wrapped.peft_config[ADAPTER]
    up = weights[f"{module}.{LORA}B.{ADAPTER}.weight"]
    delta: Tensor = settings.lora_alpha / settings.r * (up.float() @ down.float())
    return base + delta


def readme(options: RecoverOptions, checkpoint: Checkpoint, masks: Masks, outcome: Mapping[str, Any]) -> str:
    """What was done, for who finds the directory."""
    config = checkpoint.config
    dense = config.block_parameters * config.num_hidden_layers
    begin, best = outcome["begin"], outcome["best"]
    kind = f"adapters of rank {options.lora}, merged (and in adapter/)" if options.lora else "all weights of the blocks"
    plain = (
        "transformers and what builds on it loads it as the pruned model: the zeros alone compute it."
        if masks.norm_scope == "full"
        else "Its norms see the read sets only (norm_scope selected): load it with dispc, or `dispc.apply_masks`."
    )
    return f"""# {checkpoint.directory.resolve().name}, pruned and recovered

Pruned to {masks.kept_parameters(config):,} of {dense:,} block parameters by `masks.safetensors` (DISP-LLM), and trained
by dispc {__version__} under these masks: {kind}; loss `{options.loss}`, {outcome["steps"]} steps of
{options.batch_size * options.accumulate} sequences of {options.sequence_length} tokens.
Written are the weights of step {outcome["best_step"]}.

| on held-out text (nats) | before | after |
|---|---|---|
| divergence from the dense model | {begin["distil"]:.4f} | {best["distil"]:.4f} |
| loss of the text | {begin["text"]:.4f} | {best["text"]:.4f} |

Names and shapes are those of the dense model, with zeros outside of the sets. {plain}

    dispc compile {options.output.name} --target onnx-cpu
    dispc validate {options.output.name}-onnx-cpu --reference {options.output.name}
"""
