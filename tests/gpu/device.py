"""Where the GPU tests run, and what a test does to a GPU that a CPU has no word for.

With a GPU they run on it at every size. Without one they are skipped, but for ZS3FAST_GPU_DRY_RUN=1: then the same test
bodies run on the CPU (C++ and Triton's interpreter in the place of the GPU's kernels) at their smallest size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

DRY_RUN = os.environ.get("ZS3FAST_GPU_DRY_RUN") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not DRY_RUN else "cpu"
ON_GPU = DEVICE == "cuda"
if DRY_RUN:
    os.environ["TRITON_INTERPRET"] = "1"  # on a machine with a GPU too

SLEEP_CYCLES = 50_000_000  # some 30 ms: longer than any launch of these tests takes to be queued


def skip_without_gpu() -> None:
    """Skip the calling module, in one line, where there is nothing to run it on."""
    if not ON_GPU and not DRY_RUN:
        pytest.skip("no CUDA device (ZS3FAST_GPU_DRY_RUN=1 runs these on the CPU)", allow_module_level=True)


def skip_unless_free(nbytes: int) -> None:
    """Skip the calling test if the GPU has less than `nbytes` left."""
    if ON_GPU:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < nbytes:
            pytest.skip(f"needs {nbytes / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of `call`, as a function that replays it and returns its results; on the CPU the call itself."""
    if not ON_GPU:
        return call
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles, and fills what is kept from call to call
        call()
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


@contextmanager
def busy_stream() -> Iterator[None]:
    """A stream of its own that is late: what is queued on another does not wait for it, and reads old values."""
    if not ON_GPU:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        yield
    stream.synchronize()


def far_apart(x: Tensor, reach: int) -> Tensor:
    """The values of x [rows >= 2, ...] in a buffer in which the last row begins `reach` elements behind the first."""
    step = -(-reach // (x.shape[0] - 1)) + x[0].numel()
    buffer = torch.empty(step * (x.shape[0] - 1) + x[0].numel(), dtype=x.dtype, device=x.device)
    return buffer.as_strided(x.shape, (step, *x[0].contiguous().stride())).copy_(x)
