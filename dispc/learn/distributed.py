"""Several processes under torchrun: each computes its share of a step's sequences, the frozen model is sharded.

The hypernetwork is replicated: it is small, and every process updates its copy with the same averaged gradient of the
gates, the same noise and the same optimiser, so that the copies stay equal without a word about weights.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dispc.errors import LearnError
from dispc.extras import need
from dispc.families import DecoderConfig


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
        """Join the run that torchrun started, or be alone; `device` is cpu, cuda, or None for cuda if there is one."""
        if device == "cuda" and not torch.cuda.is_available():
            raise LearnError("--device cuda: torch sees no CUDA device; choose --device cpu, or install a CUDA build")
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Processes(0, 1, torch.device(kind))
        need("accelerate", "learn")
        from accelerate import PartialState

        state = PartialState(cpu=kind == "cpu")
        return Processes(state.process_index, state.num_processes, state.device)

    def shard(self, model: Any, config: DecoderConfig) -> None:
        """Split the frozen weights over the processes by FSDP2, block by block; each is whole only while it runs."""
        if self.count == 1:
            return
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

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()
