"""Options of `pytest bench/ops`, and what is saved with its numbers; see test_ops.py."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from bench import harness
from bench.op_shapes import NAMED
from bench.setting import DTYPES
from zs3fast.ops import use_backend


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("zs3fast ops")
    names = [name for name in NAMED if name != "tiny"]
    group.addoption("--shapes", nargs="+", choices=tuple(NAMED), default=names, help="named shapes (all)")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--dtype", choices=tuple(DTYPES), default="float32")
    group.addoption("--backend", default="auto", help="backend of zs3fast's ops")
    group.addoption("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    group.addoption("--all", action="store_true", help="on a CPU, also the shapes that take gigabytes or minutes there")


@pytest.fixture
def options(request: pytest.FixtureRequest) -> argparse.Namespace:
    """What an op script's `make` wants to know; threads and backend are set."""
    get = request.config.getoption
    threads = torch.get_num_threads()
    torch.set_num_threads(get("--threads"))
    with use_backend(get("--backend")):
        yield argparse.Namespace(device=get("--device"), dtype=get("--dtype"), backend=get("--backend"))
    torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    described = harness.environment(config.getoption("--device"))
    machine_info.update(described, threads=config.getoption("--threads"))


def pytest_benchmark_compare_machine_info(
    config: pytest.Config, benchmarksession: Any, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Numbers of another device are refused."""
    before, now = compared_benchmark["machine_info"].get("device"), machine_info["device"]
    if before != now:
        raise pytest.UsageError(f"--benchmark-compare: the saved run was measured on {before!r}, this is {now!r}")
