"""Where CUDA C++ kernels were measured faster than the Triton kernels of the same op: `auto` takes them there alone.

An entry is written from a run of bench/gpu_suite.sh on a card of that architecture, and names the file under
bench/results that shows it. There is none: no CUDA C++ kernel has run on a card yet.
"""

from __future__ import annotations

# op -> architecture ("sm_90") -> Triton's time divided by the CUDA kernel's, the smallest over the shapes measured
SPEEDUP_OVER_TRITON: dict[str, dict[str, float]] = {}


def faster_than_triton(op: str, architecture: str) -> bool:
    """Whether `auto` may take the CUDA C++ kernel of `op` on this architecture."""
    return SPEEDUP_OVER_TRITON.get(op, {}).get(architecture, 0.0) > 1.0
