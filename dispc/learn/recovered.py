"""The directory that a recovery writes: an ordinary Hugging Face model with zeros outside of the sets."""

import errno
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dispc.learn.adapter import ADAPTER, merge_adapter, save_adapter, without_adapter
from dispc.learn.recovery_options import MARKER, RecoverOptions, foreign_to_recovered
from dispc.learn.recovery_run import Recovered
from dispc.manifest import COPIED, licence_files
from dispc.masks import Masks
from dispc.model.checkpoint import Checkpoint
from dispc.model.config import DecoderConfig
from dispc.model.packed import rows
from dispc.reference.masked import load_reference, zero_outside
from dispc.support.directories import staged_directory
from dispc.support.errors import CheckpointError, first_line
from dispc.support.files import real, write_json, write_text
from dispc.support.inputs import contents
from dispc.support.version import __version__


def write_recovered(
    options: RecoverOptions,
    checkpoint: Checkpoint,
    masks: Masks,
    wrapped: Any,
    weights: Mapping[str, Tensor],
    outcome: Recovered,
    *,
    force: bool,
) -> None:
    """Write `options.output`, which appears at once: configuration and tokenizer, weights, masks, README.

    `weights` are those of the trained model by name, on the CPU, with the adapters of peft's `wrapped` among them
    where there are any. Names, shapes and dtypes of the tensors are those of the checkpoint.
    """
    model = load_reference(checkpoint, None)
    settings = None if wrapped is None else wrapped.peft_config[ADAPTER]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(without_adapter(name, weights, settings))
    with staged_directory(options.output, force, MARKER, foreign_to_recovered) as stage:
        _write_model(model, checkpoint, masks, stage)
        if wrapped is not None:
            save_adapter(weights, settings, stage / "adapter")
        write_json(stage / MARKER, {"dispc": __version__, "options": options.as_dict()} | asdict(outcome))
        write_text(stage / "README.md", readme(options, checkpoint, masks, outcome))


def write_pruned(checkpoint: Checkpoint, masks: Masks, adapter: Path | None, out: Path) -> None:
    """Write the pruned model directory `out`, which appears at once; with what an `adapter` directory changes.

    Raises:
        DispcError: when the masks or the adapter belong to another model, or `out` exists.
    """
    masks.check(checkpoint.config)
    model = load_reference(checkpoint, None)
    if adapter is not None:
        merge_adapter(model, adapter)
    with staged_directory(out, force=False, marker=MARKER) as stage:
        _write_model(model, checkpoint, masks, stage)
        if (checkpoint.directory / "README.md").is_file():  # which names the licence
            (stage / "README.md").write_bytes(contents(checkpoint.directory / "README.md", CheckpointError))


def _write_model(model: Any, checkpoint: Checkpoint, masks: Masks, folder: Path) -> None:
    """Write the weights of a reference as the checkpoint has them: projections that it packs are packed again."""
    zero_outside(model, checkpoint.config.family, masks)
    separate = dict(model.named_parameters())
    stored = checkpoint.load_model(torch.float32)
    with torch.no_grad():
        for name, parameter in stored.named_parameters():
            _fill(parameter, name, separate, checkpoint.config)
    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values()}
    if len(dtypes) == 1:
        stored.to(dtypes.pop())
    try:
        stored.save_pretrained(str(folder))
    except SafetensorError as error:  # where the system says that the disk is full
        raise OSError(errno.EIO, first_line(error), str(folder)) from error
    for name in (*COPIED, *licence_files(checkpoint.directory)):
        if (checkpoint.directory / name).is_file():
            (folder / name).write_bytes(contents(checkpoint.directory / name, CheckpointError))
        else:  # a generation_config.json of transformers' own defaults would overrule config.json
            (folder / name).unlink(missing_ok=True)
    masks.save(folder / "masks.safetensors", checkpoint.config)


def _fill(parameter: Tensor, name: str, separate: Mapping[str, Tensor], config: DecoderConfig) -> None:
    """Give the parameter `name` of a stored model the values of the projection, or projections, in it."""
    for packed in config.family.packed:
        block, found, kind = name.rpartition(f".{packed.module}.")
        if found:
            for part in packed.parts:
                parameter[torch.from_numpy(rows(packed, part, config))] = separate[f"{block}.{part}.{kind}"]
            return
    parameter.copy_(separate[name])


def readme(options: RecoverOptions, checkpoint: Checkpoint, masks: Masks, outcome: Recovered) -> str:
    """The README: what was done, for readers of the directory."""
    config = checkpoint.config
    dense = config.all_block_parameters
    begin, best = outcome.begin, outcome.best
    kind = f"adapters of rank {options.lora}, merged (and in adapter/)" if options.lora else "all weights of the blocks"
    plain = (
        "transformers and what builds on it loads it as the pruned model: the zeros alone compute it."
        if masks.norm_scope == "full"
        else "Its norms see the read sets only (norm_scope selected): load it with dispc, or `dispc.apply_masks`."
    )
    return f"""# {real(checkpoint.directory).name}, pruned and recovered

Pruned to {masks.kept_parameters(config):,} of {dense:,} block parameters by `masks.safetensors` (DISP-LLM), and trained
by dispc {__version__} under these masks: {kind}; loss `{options.loss}`, {outcome.steps} steps of
{options.sequences} sequences of {options.sequence_length} tokens.
Written are the weights of step {outcome.best_step}.

| on held-out text (nats) | before | after |
|---|---|---|
| divergence from the dense model | {begin["distil"]:.4f} | {best["distil"]:.4f} |
| loss of the text | {begin["text"]:.4f} | {best["text"]:.4f} |

Names and shapes are those of the dense model, with zeros outside of the sets. {plain}

    dispc compile {options.output.name} --target onnx-cpu
    dispc validate {options.output.name}-onnx-cpu --reference {options.output.name}
"""
