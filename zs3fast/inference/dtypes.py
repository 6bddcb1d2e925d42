"""The device and floating-point type a model runs in; `dtype="auto"`: the fastest without a visible price in labels."""

from __future__ import annotations

import copy
import logging
import re
from functools import cache
from pathlib import Path

import torch

from zs3fast.encoders.quantize import quantize_encoder, runs_kernels
from zs3fast.inference.options import SegmenterOptions
from zs3fast.models.base import ZeroShotModel

logger = logging.getLogger("zs3fast")

# Parameters from which bfloat16 is worth its rounding. On a busy Zen 5, 197 tokens through blocks of 0.2 to 9.5 M
# parameters took 1 to 46 ms and 1.2 to 1.5 times less in bfloat16, through 21 M 2.0 times less.
_LARGE = 10_000_000
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


def suited(model: ZeroShotModel, options: SegmenterOptions, own: bool = False) -> ZeroShotModel:
    """The model on the device, in the type and the bits of the options, in eval mode.

    Where it must change it is a copy, if it is not `own`: a caller's model stays as it was. The automatic type is for
    large float32 models: whoever has chosen a type keeps it, and small ones gain too little for their rounding. What it
    chose is logged, once a process. Beside 8 bits it is chosen where those are kernels of ours, which take either type
    and are made of the weights as they came.
    """
    like = next(model.parameters())
    device = like.device if options.device is None else torch.device(options.device)
    dtype = options.torch_dtype
    quantizes = options.quantize is not None and getattr(model, "quantized", None) != options.quantize
    ours = quantizes and device.type == like.device.type and runs_kernels(model, options.quantize)
    if dtype is None and like.dtype == torch.float32 and (options.quantize is None or ours):
        if sum(parameter.numel() for parameter in model.parameters()) >= _LARGE:
            dtype = auto_dtype(device)
            _say(dtype, device.type)
    changes = dtype is not None and any(p.dtype != dtype for p in model.parameters() if p.is_floating_point())
    moves = like.device != torch.empty(0, device=device).device
    if (changes or moves or quantizes) and not own:
        model = copy.deepcopy(model)
    if ours:
        quantize_encoder(model.eval(), "int8")
    if changes or moves:
        model = model.to(device=device, dtype=dtype)
    model.eval()
    if quantizes and not ours:
        quantize_encoder(model, options.quantize or "")
    return model


@cache
def _say(dtype: torch.dtype, device: str) -> None:
    logger.info("dtype auto: models run in %s on %s; dtype='float32' keeps them as they are", str(dtype)[6:], device)


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
