"""`auto_dtype`: bfloat16 only where it is known to be faster."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zs3fast.inference import dtypes

INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n"
ZEN_4 = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\n"
ZEN_5 = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("cpuinfo", "amx", "permitted", "bf16", "capability", "expected"),
    [
        (INTEL, True, True, True, "AVX512", torch.bfloat16),
        (INTEL, True, False, True, "AVX512", torch.float32),  # a container that forbids the tiles
        (INTEL, False, False, True, "AVX512", torch.float32),
        (INTEL, True, True, True, "AVX2", torch.float32),  # ATEN_CPU_CAPABILITY=avx2
        (ZEN_4, False, False, True, "AVX512", torch.float32),
        (ZEN_5, False, False, True, "AVX512", torch.bfloat16),
        (ZEN_5, False, False, False, "AVX512", torch.float32),
        (ZEN_5, False, False, True, "DEFAULT", torch.float32),
        (ARM, False, False, False, "DEFAULT", torch.float32),
    ],
)
def test_cpu(
    cpuinfo: str,
    amx: bool,
    permitted: bool,
    bf16: bool,
    capability: str,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    told = dtypes._vendor_and_family(tmp_path / "cpuinfo")
    monkeypatch.setattr(dtypes, "_vendor_and_family", lambda: told)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: permitted)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    dtypes._cpu_multiplies_bf16_fast.cache_clear()
    try:
        assert dtypes.auto_dtype("cpu") == expected
    finally:
        dtypes._cpu_multiplies_bf16_fast.cache_clear()


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_cuda(capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: capability)
    assert dtypes.auto_dtype("cuda") == expected


def test_no_cpuinfo_and_other_devices(tmp_path: Path) -> None:
    assert dtypes._vendor_and_family(tmp_path / "none") == ("", 0)
    assert dtypes.auto_dtype(torch.device("meta")) == torch.float32
