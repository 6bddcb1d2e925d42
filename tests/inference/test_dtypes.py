"""`auto_dtype`: bfloat16 only where it is known to be faster."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from zs3fast.inference import dtypes
from zs3fast.inference.options import SegmenterOptions

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


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"dtype": torch.float16}, {"dtype": "auto"}, {"dtype": None}, {"quantize": "int8"}],
    ids=str,
)
def test_a_callers_model_stays_as_it_was(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if "quantize" in options:
        pytest.importorskip("torchao", reason="needs torchao (pip install 'zs3fast[quantize]')")
    monkeypatch.setattr(dtypes, "_LARGE", 0)
    monkeypatch.setattr(dtypes, "auto_dtype", lambda device: torch.bfloat16)
    model = tiny_model("zegclip")
    before = {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    suited = dtypes.suited(model, SegmenterOptions(**options))
    assert {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in model.state_dict().items()} == before
    assert [type(module) for module in model.modules()] == kinds and not hasattr(model, "quantized")
    if "quantize" in options:
        assert suited.quantized == "int8" and dtypes.suited(suited, SegmenterOptions(**options)) is suited
    else:
        expected = torch.float16 if options["dtype"] == torch.float16 else torch.bfloat16
        assert {parameter.dtype for parameter in suited.parameters()} == {expected}


def test_auto_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dtypes, "_LARGE", 0)
    monkeypatch.setattr(dtypes, "auto_dtype", lambda device: torch.bfloat16)
    dtypes._say.cache_clear()
    with caplog.at_level(logging.INFO, "zs3fast"):
        for _ in range(2):
            dtypes.suited(tiny_model("zegclip"), SegmenterOptions())
        dtypes.suited(tiny_model("zegclip"), SegmenterOptions(dtype="float32"))
    said = [message for message in caplog.messages if message.startswith("dtype auto")]
    assert said == ["dtype auto: models run in bfloat16 on cpu; dtype='float32' keeps them as they are"]


@pytest.mark.parametrize("dtype", [torch.zeros(2), np.zeros(2), ["float32"], 32, torch.float64])
def test_what_is_no_type_is_refused_in_one_line(dtype: Any) -> None:
    """An array too, which Python cannot compare with a name."""
    with pytest.raises(ValueError, match="^dtype: expected one of float32, bfloat16, float16, auto, got .*$"):
        SegmenterOptions(dtype=dtype)
