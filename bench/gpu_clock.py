"""A GPU's own time of a call, by events: as it is made, and as its CUDA graph, which no launch delays.

What the call reads is not in the cache: before every sample the GPU reads something larger than its L2, outside of the
events, as inputs that are replaced by others between calls would. A graph replayed on its own would read from there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

L2_TIMES = 2  # what is read before a sample, in L2 caches
FALLBACK_L2 = 64 * 2**20  # bytes, where the card does not say


def gpu_times(
    run: Callable[[], Any], *, rounds: int, device: torch.device | str, cuda: Any = torch.cuda
) -> dict[str, float | str]:
    """Milliseconds of `run` on the GPU, medians over rounds: "events_ms" and "graph_ms".

    A call that cannot be captured has "graph_failed", the reason, in place of "graph_ms". `cuda`: torch.cuda.
    """
    l2 = getattr(cuda.get_device_properties(device), "L2_cache_size", 0) or FALLBACK_L2
    lines = torch.ones(L2_TIMES * l2 // 4, device=device)

    def median_ms(call: Callable[[], Any]) -> float:
        spans = []
        for _ in range(rounds):
            lines.sum()  # reads: lines that were written would be written back during the sample
            begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            spans.append((begin, end))
        cuda.synchronize(device)
        return statistics.median(begin.elapsed_time(end) for begin, end in spans)

    found: dict[str, float | str] = {"events_ms": median_ms(run)}
    try:
        side = cuda.Stream(device)
        side.wait_stream(cuda.current_stream(device))
        with cuda.stream(side):
            run()
        cuda.current_stream(device).wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            run()
        found["graph_ms"] = median_ms(graph.replay)
    except Exception as error:  # a call that waits for the device, or allocates behind torch's back
        found["graph_failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        cuda.synchronize(device)
    return found


def floors(device: torch.device | str, dtype: torch.dtype, *, rounds: int, tiny: bool = False) -> dict[str, float]:
    """What this machine reaches now: bytes a second of a copy ("copy_gb_s", read and written) and FLOPs of a matrix
    product ("product_tflop_s"). Times by events on a GPU, by the clock elsewhere."""
    from bench import harness

    size, side = (2**16, 64) if tiny else (2**28, 8192) if torch.device(device).type == "cuda" else (2**25, 1024)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    left = torch.ones(side, side, device=device, dtype=dtype)
    calls = [
        harness.Contender("copy", lambda: target.copy_(source)),
        harness.Contender("product", lambda: left @ left),
    ]
    timings = harness.measure(calls, rounds=rounds, device=device, own_time=True)
    seconds = {
        name: timing.median if timing.gpu is None else float(timing.gpu["events_ms"]) / 1e3
        for name, timing in timings.items()
    }
    return {
        "copy_gb_s": 2 * size / seconds["copy"] / 1e9,
        "product_tflop_s": 2 * side**3 / seconds["product"] / 1e12,
    }
