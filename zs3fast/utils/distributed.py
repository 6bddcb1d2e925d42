"""The processes of a run: one, or as many as torchrun started; and how a model is spread over them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Value = TypeVar("Value")

# FSDP and DTensor are imported where a model may be sharded: one process that evaluates needs neither.


@dataclass(frozen=True)
class DistEnv:
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

    def agreed(self, value: Value) -> Value:
        """The first process's value, on all; it is pickled."""
        held = [value]
        if self.world > 1:
            dist.broadcast_object_list(held)
        return held[0]

    def gathered(self, value: Value) -> list[Value]:
        """The values of all processes, on all, by rank; they are pickled."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, of torch.distributed; (0, 1) without it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def usable_device(device: str | None) -> str:
    """A device by name, tried; None: "cuda" if there is one, else "cpu".

    Raises:
        ValueError: no device, or not to be used here.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return device


@contextmanager
def dist_env(device: str | None = None, patience: timedelta | None = None) -> Iterator[DistEnv]:
    """Join the processes of torchrun, if it started this one, and choose this process's device.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; None: cuda if there is one. Under torchrun plain "cuda" means the GPU of
            the local rank.
        patience: how long a process waits for the others before it fails; None: as long as torch.distributed does.
    Raises:
        ValueError: a device that cannot be used here.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    usable_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    started = world > 1 and not dist.is_initialized()
    if started:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=patience)
    try:
        yield DistEnv(*rank_and_world(), torch.device(device))
    finally:
        if started:
            dist.destroy_process_group()


def sum_over_processes(value: Tensor) -> None:
    """Add the values of all processes into each, in place."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(value)


def parallelize(step: nn.Module, parallel: str, env: DistEnv, unused: bool = False) -> nn.Module:
    """The training step over all processes: DDP, or FSDP2 with every encoder block and the rest sharded.

    Args:
        unused: whether an iteration may leave parameters without a gradient, which DDP has to be told. With three and
            more processes it is told in any case: only then does it keep the buckets it starts with, and sums over
            processes round alike before and after a resume.
    """
    if parallel == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if not dist.is_initialized():
            raise ValueError("parallel: fsdp shards over processes; start the run with torchrun")
        mesh = init_device_mesh(env.device.type, (env.world,))
        for block in encoder_blocks(step.get_submodule("model")):
            fully_shard(block, mesh=mesh)
            if hasattr(block, "context"):  # keys and values of prompts are asked for outside forward
                register_fsdp_forward_method(block, "context")
        fully_shard(step, mesh=mesh)
        return step
    if env.world == 1:
        return step
    devices = [env.device] if env.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its former name
    options: dict[str, Any] = {buffers: False, "find_unused_parameters": unused or env.world > 2}
    return DistributedDataParallel(step, device_ids=devices, **options)


def accumulating(step: nn.Module, more: bool) -> AbstractContextManager[None]:
    """Where one micro-batch runs: gradients are exchanged unless more are to come in this iteration."""
    if isinstance(step, DistributedDataParallel):
        return step.no_sync() if more else nullcontext()
    synchronise = getattr(step, "set_requires_gradient_sync", None)  # of FSDP2
    if synchronise is not None:
        synchronise(not more)
    return nullcontext()


def encoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of the image encoder; none of a ResNet."""
    transformer = getattr(model.encoder, "transformer", None)
    return [] if transformer is None else list(transformer.resblocks)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a process holds only a part of it."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor put together on every process (all must call); any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor into one that may be sharded."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)
