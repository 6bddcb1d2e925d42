"""Every GPU test: unwritten memory is NaN, precision is put back, and a lost GPU fails one test and not the rest."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from tests.gpu.device import ON_GPU
from tests.ops.conftest import poisoned_memory  # noqa: F401  (a fixture, for every test here)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): tests of a group run in one worker, one after the other")


@pytest.fixture(autouse=True)
def exact_fp32():
    """torch's products of fp32 are exact unless a test asks for tf32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture(autouse=True)
def lost_gpu():
    """An illegal access is fatal to its process. A worker of pytest-xdist then ends, and another takes its place."""
    yield
    if not ON_GPU:
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        print(f"the GPU is lost to this process: {error}", file=sys.stderr, flush=True)
        os._exit(70)
