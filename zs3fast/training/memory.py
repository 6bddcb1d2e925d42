"""What a process and a training step take: resident memory, a limit to it, and what autograd keeps for the way back."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return _status_bytes("VmRSS")


def available_bytes() -> int | None:
    """Memory that new processes can take without swapping; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else None


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

    Read from VmHWM, not ru_maxrss: a child's ru_maxrss starts at its parent's peak.
    """
    return _status_bytes("VmHWM")


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


def _status_bytes(key: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(rf"^{key}:\s+(\d+) kB", status.read_text(), re.MULTILINE)[1]) * 1024
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
