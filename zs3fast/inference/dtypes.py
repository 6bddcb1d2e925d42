"""The floating-point type a model runs fastest in on a device, without a visible price in labels: `dtype="auto"`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch

BF16_CAPABILITY = (8, 0)  # the first GPUs whose tensor cores multiply bfloat16

# CPUs without AMX on which bfloat16 products were measured faster than float32's (docs/performance.md): vendor and
# first family. On Zen 5 `vdpbf16ps` has twice the rate of float32's FMA; on Intel's cores without AMX half of that.
_FAST_DOT_PRODUCTS = ("AuthenticAMD", 26)


def auto_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, else float32.

        CUDA   bfloat16 from compute capability 8.0 on
        CPU    bfloat16 with AMX tiles that the operating system lets the process use, and on those CPUs with
               AVX-512-BF16 alone where it was measured faster; `ATEN_CPU_CAPABILITY` below avx512 gives float32
        other  float32

    Args:
        device: where the model runs; without an index, the current one.
    Returns:
        torch.bfloat16 or torch.float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    else:
        fast = device.type == "cpu" and _cpu_multiplies_bf16_fast()
    return torch.bfloat16 if fast else torch.float32


@cache
def _cpu_multiplies_bf16_fast() -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    if torch.cpu._is_amx_tile_supported():
        return bool(torch.cpu._init_amx())  # asks the operating system, once a process
    vendor, family = _vendor_and_family()
    return (
        bool(torch.cpu._is_avx512_bf16_supported())
        and vendor == _FAST_DOT_PRODUCTS[0]
        and (family >= _FAST_DOT_PRODUCTS[1])
    )


def _vendor_and_family(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, int]:
    """As Linux tells them; ("", 0) where it does not."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return "", 0
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    family = re.search(r"^cpu family\s*:\s*(\d+)", text, re.MULTILINE)
    return (vendor[1], int(family[1])) if vendor and family else ("", 0)
