"""The processes an evaluation runs in: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def joined(device: str | None) -> Iterator[str]:
    """Join the processes of torchrun, if it started this one, and choose this process's device.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; None: cuda if there is one. Under torchrun plain "cuda" means the GPU of
            the local rank.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} cannot be used here ({str(error).splitlines()[0]})") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    started = world > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        if started:
            dist.destroy_process_group()


def place() -> tuple[int, int]:
    """(rank, world) of torch.distributed; (0, 1) without it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
