"""A shared library of test sources, by the C++ compiler that is there."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

OPTIONS = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


def shared_library(output: Path, sources: Sequence[Path], *options: str) -> ctypes.CDLL:
    """The sources compiled into `output` and loaded; skips the test where there is no compiler."""
    named = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    compiler = next((path for path in map(shutil.which, named) if path), None)
    if compiler is None:
        pytest.skip("no C++ compiler (CXX, c++, g++, clang++)")
    done = subprocess.run([compiler, *OPTIONS, *options, *sources, "-o", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(output))
