"""The processes of a run: one, or as many as torchrun started."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from zs3fast.evaluation.processes import joined, place


@dataclass(frozen=True)
class Workers:
    """This process among all of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """The process that writes files and talks."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def workers(device: str | None = None) -> Iterator[Workers]:
    """Join the processes that torchrun started, or be the only one; `device` as for `evaluation.processes.joined`."""
    with joined(device) as place_name:
        yield Workers(*place(), torch.device(place_name))


def spread(step: nn.Module, parallel: str, group: Workers) -> nn.Module:
    """The training step over all processes: DDP, or FSDP2 with every encoder block and the rest sharded.

    DDP is told that parameters may go without a gradient. Some do (the official code trains such too), and only then
    does it keep the buckets it starts with: sums over three and more processes then round alike before and after a
    resume.
    """
    if parallel == "fsdp":
        if not dist.is_initialized():
            raise ValueError("parallel: fsdp shards over processes; start the run with torchrun")
        mesh = dist.init_device_mesh(group.device.type, (group.world,))
        for block in encoder_blocks(step.model):
            fully_shard(block, mesh=mesh)
            if hasattr(block, "context"):  # keys and values of prompts are asked for outside forward
                register_fsdp_forward_method(block, "context")
        return fully_shard(step, mesh=mesh)
    if group.world == 1:
        return step
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    devices = [group.device] if group.device.type == "cuda" else None
    return DistributedDataParallel(step, device_ids=devices, broadcast_buffers=False, find_unused_parameters=True)


def accumulating(step: nn.Module, more: bool) -> AbstractContextManager[None]:
    """Where one micro-batch runs: gradients are exchanged unless more are to come in this iteration."""
    if isinstance(step, FSDPModule):
        step.set_requires_gradient_sync(not more)
    elif isinstance(step, DistributedDataParallel) and more:
        return step.no_sync()
    return nullcontext()


def encoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of the image encoder; none of a ResNet."""
    return list(model.encoder.transformer.resblocks) if hasattr(model.encoder, "transformer") else []


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together on every process (all must call); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)
