"""What a process and a training step take: resident memory, a limit to it, and what autograd keeps for the way back."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss


def available_bytes() -> int:
    """Memory that new processes can take without swapping."""
    return psutil.virtual_memory().available


def limit_memory(limit: int) -> None:
    """Let this process's own data grow to `limit` bytes: allocations beyond it fail (Linux; elsewhere no limit)."""
    if sys.platform == "linux":
        import resource  # not on every system

        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = ("allocate memory", "bad_alloc", "failed to map segment")  # the last: of a library that is loaded late
    return isinstance(error, (RuntimeError, ImportError)) and any(words in str(error) for words in told)


def reset_peak_resident() -> None:
    """Start a new measurement of `peak_resident_bytes` (Linux; elsewhere it stays the peak of the whole process)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_resident_bytes() -> int:
    """Highest resident memory of this process since `reset_peak_resident`, or since its start.

    On Linux read from VmHWM, which psutil does not give: a child's ru_maxrss starts at its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def kept_for_backward(forward: Callable[[], Any]) -> dict[tuple[int, int], Tensor]:
    """The tensors that autograd keeps while `forward` runs, parameters apart, one for each piece of memory.

    What `forward` returns is let go with everything else. Views of one storage count once, at the storage's size:
    `sum(t.untyped_storage().nbytes() for t in kept.values())` are the bytes a step stores between forward and
    backward. What a custom autograd function puts on its context without `save_for_backward` is not seen.
    """
    kept: dict[tuple[int, int], Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr(), storage.nbytes()] = tensor.detach()  # which holds the memory: no address twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return kept
