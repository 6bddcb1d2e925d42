"""Triton kernels compiled for GPUs that are not here: sm_80, sm_90 and sm_100, spills and tensor cores looked at."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ops.ahead_of_time import Compiled, compile_plan, merged, plan, problems
from tests.ops.aot import AotReport, AotRequest, compile_all, judge, triton_version
from tests.ops.launches import cases

pytest.importorskip("triton")

OPS = sorted({case.op for case in cases()})
CLEAN = AotReport("a request", 90, "", registers=64, spills=0, shared_bytes=1024, uses_tensor_cores=True)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, list[Compiled]]:
    """Of the ops whose tests run, all at once: starting a compiling process costs seconds."""
    asked = {item.callspec.params["op"] for item in request.session.items if _needs_it(item, request)}
    chosen = [c for op in sorted(asked) for c in plan(op, everything=False)]
    everything = compile_plan(chosen, jobs=min(2, os.cpu_count() or 1))
    return {op: [c for c in everything if c[0].op == op] for op in asked}


def _needs_it(item: pytest.Item, request: pytest.FixtureRequest) -> bool:
    """Another module's fixture may have the name."""
    return item.path == request.path and "compiled" in getattr(item, "fixturenames", [])


@pytest.mark.parametrize("op", OPS)
def test_gpu_code_is_clean(op: str, compiled: dict[str, list[Compiled]]) -> None:
    """It compiles, fits in shared memory, has tensor cores multiply half types, and keeps to its budget of spills."""
    assert compiled[op], "an op without a case"
    assert not problems(compiled[op])


def test_every_kernel_is_compiled() -> None:
    folder = Path(__file__).parents[2] / "kernels"
    written = {
        name
        for path in folder.glob("[a-z]*.py")
        for name in re.findall(r"^def (\w+_kernel\w*)\(", path.read_text(), re.M)
    }
    compiled = {launch.name for case in cases() for launch in case.launches()}
    assert written and compiled == written


def test_logs_make_one_table() -> None:
    """Ranges over architectures, a group of columns a Triton; a later log replaces rows of an earlier one."""
    first = """+ what was compiled ahead of time
| kernel | sm | specialisations | registers | spilled bytes | blocks an SM | on tensor cores |
|---|---|---|---|---|---|---|
| a_fwd_kernel | 80 | 4 | 62-238 | 8 | 1-8 | 2 |
| a_fwd_kernel | 90 | 4 | 60 | 0 | 8 | 2 |
| b_bwd_kernel_dq | 90 | 1 | 255 | 40 | 1 | 0 |
Triton 3.10: 9 specialisations compiled, 0 problems"""
    second = """| b_bwd_kernel_dq | 90 | 1 | 168 | 0 | 2 | 0 |
Triton 3.10: 1 specialisations compiled, 0 problems
| a_fwd_kernel | 90 | 4 | 90-96 | 0 | 5 | 2 |
Triton 3.8: 4 specialisations compiled, 0 problems"""
    head, _, *rows = merged([first, second]).splitlines()
    assert head.split(" | ")[1:8] == [
        *(f"3.8: {c}" for c in ("sm", "compiled", "registers", "spilled", "blocks", "tensor cores")), "3.10: sm"
    ]  # fmt: skip
    assert rows == [
        "| a_fwd_kernel | 90 | 4 | 90-96 | 0 | 5 | 2 | 80, 90 | 8 | 60-238 | 8 | 1-8 | 4 |",
        "| b_bwd_kernel_dq | - | - | - | - | - | - | 90 | 1 | 168 | 0 | 2 | 0 |",
    ]


def test_every_launch_is_named_once() -> None:
    """aot_budget.json speaks of specialisations by name."""
    names = [f"{case.op} {case.name}" for case in cases()]
    assert len(names) == len(set(names))
    known = {f"{launch.name} {case.name} sm_{arch}" for case, launch, arch in plan()}
    budgets = json.loads(judge.__globals__["BUDGET"].read_text())
    assert not {key for budget in budgets.values() for key in budget} - known, "budgets of kernels that are not there"


def test_spills_are_judged_by_version() -> None:
    spilled = replace(CLEAN, spills=8)
    assert judge([("k", CLEAN, True)], "3.8") == []
    assert judge([("k", spilled, True)], "3.8") == ["k: 8 bytes spilled a thread (64 registers)"]
    with pytest.warns(UserWarning, match=r"Triton 9.9 has no budget \(known: .*3.8.*\):\nk: 8 bytes spilled"):
        assert judge([("k", spilled, True)], "9.9") == []
    large = replace(CLEAN, shared_bytes=10**6)
    for version in ("3.8", "9.9"):  # no version excuses these
        assert "1000000 bytes of shared memory, limit" in judge([("k", large, None)], version)[0]
        assert "tensor cores used: True" in judge([("k", CLEAN, False)], version)[0]


def test_blocks_an_sm() -> None:
    """65536 registers, handed out in eights a thread; 2048 threads; shared memory with 1 KiB for the system."""
    assert replace(CLEAN, registers=250, warps=4).blocks_per_sm() == 2
    assert replace(CLEAN, registers=168, warps=4).blocks_per_sm() == 3
    assert replace(CLEAN, registers=169, warps=4).blocks_per_sm() == 2
    assert replace(CLEAN, registers=32, warps=4).blocks_per_sm() == 16
    assert replace(CLEAN, registers=32, shared_bytes=75 * 1024).blocks_per_sm() == 3


def test_failures_name_the_kernel() -> None:
    request = AotRequest("zs3fast.kernels.mask_loss:mask_loss_fwd_kernel", {"logits": "*fp32"}, {}, 90)
    with pytest.raises(
        RuntimeError, match=r"(?s)1 of 1 kernels did not compile.*mask_loss_fwd_kernel.*without type or"
    ):
        compile_all([request])


def test_version_is_one_we_know_or_said() -> None:
    assert triton_version().count(".") == 1
