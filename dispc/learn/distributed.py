"""Several processes under torchrun: each computes its share of a step's sequences, the frozen model is sharded.

The hypernetwork is replicated: it is small, and every process updates its copy with the same averaged gradient of the
gates, the same noise and the same optimiser, so that the copies stay equal without exchanging weights.
"""

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from dispc.model.config import DecoderConfig
from dispc.model.pretrained import set_parameters
from dispc.model.text import TextTokens
from dispc.runtime.devices import torch_device
from dispc.support.extras import need

PATIENCE = timedelta(hours=2)
"""How long processes wait for the main one, which may rank positions or read a file of 100 GB."""
Read = Callable[[str, tuple[int, ...]], Tensor]
"""The values of a parameter by its name and shape; a file that is mapped is not read before they are looked at."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    count: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    @staticmethod
    def join(device: str | None) -> "Processes":
        """Join the run that torchrun started, or run alone, on `device` (see `torch_device`).

        Raises:
            DispcError: when the device or a package is not there.
        """
        own = torch_device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Processes(0, 1, own)
        need("accelerate", "learn")
        from accelerate import PartialState

        ours = not dist.is_initialized()
        state = PartialState(cpu=own.type == "cpu", timeout=PATIENCE)
        if ours and state.device.type == "cpu":
            atexit.register(_leave)
        return Processes(state.process_index, state.num_processes, state.device)

    def place(self, model: Any, config: DecoderConfig, read: Read) -> None:
        """Give `model`, whose parameters are on the meta device, the values of `read` in their dtypes, on our device.

        Several processes share them by FSDP2, block by block: each keeps its rows, and of safetensors files reads no
        others. Only one block at a time is whole on a device, so the model may be larger than its memory.
        """
        if self.count == 1:
            dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
            set_parameters(model, lambda name, shape: read(name, shape).to(dtypes[name]))
            model.to(self.device)
            return
        self._shard(model, config)
        buffers = {name: buffer.to(self.device) for name, buffer in model.named_buffers()}
        model.to_empty(device=self.device)
        for name, buffer in buffers.items():
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, buffer)
        for name, parameter in model.named_parameters(remove_duplicate=False):  # until the first step a tie is none
            self._fill(parameter, read(name, tuple(parameter.shape)))

    @torch.no_grad()
    def _fill(self, parameter: Any, whole: Tensor) -> None:
        """Copy this process's rows of a tensor, which is read no further: FSDP2 cuts as `torch.chunk` does."""
        held = parameter.to_local()
        start = min(len(whole), self.rank * -(-len(whole) // self.count))
        held.copy_(whole[start : start + len(held)])

    def _shard(self, model: Any, config: DecoderConfig) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for index in range(config.num_hidden_layers):
            fully_shard(model.get_submodule(config.family.block(index)), mesh=mesh)
        fully_shard(model, mesh=mesh)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def from_main(self, values: Tensor) -> Tensor:
        """The values of the main process, in all, in place."""
        if self.count > 1:
            dist.broadcast(values, 0)
        return values

    def digest(self, compute: Callable[[], str]) -> str:
        """The SHA-256 that `compute` gives in the main process, in all: one of them reads what it is of."""
        code = bytes.fromhex(compute()) if self.main else bytes(32)
        return bytes(self.from_main(torch.tensor(list(code), dtype=torch.uint8, device=self.device)).tolist()).hex()

    def share(self, rows: TextTokens) -> Tensor:
        """This process's part of the sequences rows [B,S], int64 on its device; all parts are equally long."""
        size = len(rows) // self.count
        mine = rows[self.rank * size : (self.rank + 1) * size]
        return torch.from_numpy(mine.astype(np.int64)).to(self.device)

    def agree(self, number: int) -> bool:
        """Whether all processes have the same number; all of them get the same answer."""
        squares = self.mean(torch.tensor([number, number**2], dtype=torch.float64, device=self.device))
        return bool(squares[1] == squares[0] ** 2)

    def anywhere(self, here: bool) -> bool:
        """Whether it is so in one process at least; all of them get the same answer."""
        return bool(self.mean(torch.tensor([float(here)], device=self.device))[0] > 0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()


def _leave() -> None:
    """End gloo's threads before the interpreter ends.

    They may still give tensors back to Python then, and the process is ended by a signal (pytorch pull request 179291).
    NCCL's communicators are left to the end of the process: ending them waits for the others, which may have failed.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def gathered(tree: Any) -> Any:
    """The same nested dictionaries and lists with whole tensors on the CPU; all processes must call it together."""
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [gathered(value) for value in tree]
    if isinstance(tree, DTensor):
        tree = tree.full_tensor()
    return tree.detach().cpu().clone() if isinstance(tree, Tensor) else tree


@torch.no_grad()
def set_parameter(parameter: Tensor, whole: Tensor) -> None:
    """Give a parameter, or what this process holds of it, the values of the whole tensor."""
    parameter.copy_(like(parameter, whole))


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    """The whole tensor on the device of `parameter`, split as that is."""
    whole = whole.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    return whole
