"""CUDA C++ kernels as they were compiled: registers, spills and shared memory of every one in the extension.

Read with cuobjdump from the built library, so nothing is compiled twice. csrc/<op>/cuda_budget.json holds what a kernel
may use, and is changed with the kernel: ZS3FAST_WRITE_BUDGET=1 pytest tests/ops/test_cuda_build.py writes what it uses.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.aot import SHARED_LIMIT
from zs3fast.ops import _dispatch, _extension

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("csrc/*/cuda*.cu"))
OPS = sorted({path.parent.name for path in SOURCES})
ARCHS = {"80": 80, "90a": 90}  # of setup.py's default, and how cuobjdump names them
KERNEL = re.compile(r"Function .*?zs3fast::(\w+)::(?:\(anonymous namespace\)::|\w+::)*(\w+(?:<.*>)?)\(")


def could_be_built() -> bool:
    """Whether `pip install` here, with what the environment says, builds CUDA kernels."""
    program = "import setuptools; setuptools.setup = lambda **_: None; exec(open('setup.py').read()); "
    program += "print(bool(cuda_settings(Torch.find())))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1] == "True"


@pytest.fixture(scope="module")
def library() -> Path:
    """The extension, built with CUDA. Where nvcc fits torch it must have been."""
    info = _extension.info()
    if info["status"] != "loaded":
        pytest.skip(info["problem"])
    if not info["cuda_archs"]:
        if could_be_built():
            pytest.fail("nvcc fits torch, and the extension has no CUDA kernels: python setup.py build_ext --inplace")
        pytest.skip("the extension was built without CUDA: no nvcc that fits torch, or ZS3FAST_CUDA=0")
    return Path(_extension.module().__file__)


def cuobjdump(*arguments: str | Path) -> str:
    triton = pytest.importorskip("triton.backends.nvidia", reason="cuobjdump comes with triton")
    program = Path(triton.__file__).parent / "bin" / "cuobjdump"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def resources(library: Path) -> str:
    return cuobjdump("-res-usage", library)


@pytest.fixture(scope="module")
def used(resources: str) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """{op: {kernel: {"sm_80": {"registers", "shared", "spilled"}}}} of the library."""
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt is not installed")
    said = subprocess.run(["c++filt"], input=resources, capture_output=True, text=True, check=True).stdout
    found: dict = {}
    arch = ""
    for line, following in zip(said.splitlines(), [*said.splitlines()[1:], ""], strict=True):
        if match := re.match(r"arch = (sm_\d+)", line.strip()):
            arch = match[1]
        if kernel := KERNEL.search(line):
            values = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", following)}
            use = {"registers": values["REG"], "shared": values["SHARED"]}
            use["spilled"] = max(values["STACK"], values["LOCAL"])
            name = re.sub(r"zs3fast::\w+::", "", kernel[2])
            found.setdefault(kernel[1], {}).setdefault(name, {})[arch] = use
    return found


def test_the_library_is_for_the_default_architectures(library: Path) -> None:
    if "ZS3FAST_CUDA_ARCHS" in os.environ:
        pytest.skip("ZS3FAST_CUDA_ARCHS chose others")
    assert _extension.info()["cuda_archs"] == list(ARCHS)


@pytest.mark.parametrize("op", OPS)
def test_within_budget(op: str, used: dict) -> None:
    """Every kernel of the op is in its budget and keeps to it on every architecture, and none spills."""
    path = ROOT / "csrc" / op / "cuda_budget.json"
    assert used.get(op), f"no kernel of {op} is in the extension: build it again"
    for kernel, archs in used[op].items():
        for arch, use in archs.items():
            assert use["spilled"] == 0, f"{kernel} spills {use['spilled']} bytes a thread on {arch}"
    if os.environ.get("ZS3FAST_WRITE_BUDGET") == "1":
        kept = {k: {a: {n: u[n] for n in ("registers", "shared")} for a, u in v.items()} for k, v in used[op].items()}
        path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    budget = json.loads(path.read_text())
    assert set(budget) == set(used[op]), f"{path.name} of {op} and the kernels of the extension differ"
    for kernel, archs in used[op].items():
        for arch, use in archs.items():
            allowed = budget[kernel].get(arch)
            if allowed is None:
                continue  # built for a card of one's own
            for name, most in allowed.items():
                assert use[name] <= most, f"{kernel} on {arch}: {use[name]} {name}, the budget is {most}"


@pytest.mark.parametrize("op", OPS)
def test_budgets_fit_the_architectures(op: str) -> None:
    budget = json.loads((ROOT / "csrc" / op / "cuda_budget.json").read_text())
    for kernel, archs in budget.items():
        assert set(archs) == {f"sm_{n}" for n in ARCHS.values()}, kernel
        for arch, allowed in archs.items():
            assert allowed["registers"] <= 255 and allowed["shared"] <= SHARED_LIMIT[int(arch[3:])], (kernel, arch)


@pytest.mark.parametrize("op", OPS)
def test_the_op_has_a_cuda_backend(op: str, library: Path) -> None:
    """Registered in Python, and plugged in where the library has it."""
    assert "cuda" in _dispatch.registered(op)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"zs3fast_cpp::{op}", "CUDA")


def test_the_library_loads_without_a_gpu_driver(library: Path) -> None:
    """It needs the CUDA runtime that comes with torch, and libcuda, which comes with a driver, not at all."""
    said = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", said)
    assert any(name.startswith("libcudart.so") for name in needed)
    assert not [name for name in needed if name.startswith("libcuda.so")]
    ctypes.CDLL(str(library))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_kernels_know_no_torch(source: Path) -> None:
    """nvcc reads every header once an architecture: torch's would take it a minute each."""
    seen, todo = set(), [source]
    while todo:
        path = todo.pop()
        seen.add(path)
        for name in re.findall(r'#include [<"](.*?)[>"]', path.read_text()):
            assert not name.startswith(("ATen", "c10", "torch")), f"{path.name} includes {name}"
            if (ROOT / "csrc" / name).is_file():
                todo += {ROOT / "csrc" / name} - seen
