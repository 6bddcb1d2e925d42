"""The compiled extension `zs3fast._C`: loaded once, and told apart whether absent or broken.

Absent (never built) is an ordinary objection of the cpp and cuda backends. Broken (there, but made for another torch
or failing to load) is also reported once as a RuntimeWarning.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import re
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


@dataclass(frozen=True)
class _Extension:
    module: ModuleType | None
    problem: str | None


def objections() -> list[str]:
    """Why the compiled kernels cannot run: empty when the extension is loaded."""
    problem = _load().problem
    return [] if problem is None else [problem]


def module() -> ModuleType:
    """The loaded extension.

    Raises:
        RuntimeError: it is absent or broken; the message says which.
    """
    extension = _load()
    if extension.module is None:
        raise RuntimeError(f"zs3fast._C: {extension.problem}")
    return extension.module


def info() -> dict[str, Any]:
    """What `zs3fast info` shows: `status` (loaded, absent or broken), and either `problem` or how it was built."""
    extension = _load()
    if extension.module is None:
        return {"status": "absent" if _file() is None else "broken", "problem": extension.problem}
    return {
        "status": "loaded",
        "torch": extension.module.torch_version,
        "compiler": extension.module.compiler,
        "cuda_archs": [arch for arch in extension.module.cuda_archs.split(",") if arch],
        "cpu_capability": extension.module.cpu_capability(),
        "threads": extension.module.num_threads(),
    }


@cache
def _load() -> _Extension:
    path = _file()
    if path is None:
        return _Extension(None, "the C++ extension is not built (reinstall with a C++ compiler: pip install -e .)")
    problem = _version_problem(path)
    if problem is None:
        try:
            return _Extension(importlib.import_module("zs3fast._C"), None)
        except ImportError as error:
            problem = f"the C++ extension {path.name} is broken: {error}"
    warnings.warn(f"zs3fast: {problem}; its kernels are not used", RuntimeWarning, stacklevel=2)
    return _Extension(None, problem)


def _file() -> Path | None:
    folder = Path(__file__).resolve().parents[1]
    candidates = (folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _version_problem(path: Path) -> str | None:
    """Read from the file, not from the module: a library made for another torch may not load, or worse, load."""
    mark = re.search(rb"zs3fast-built-for-torch=([^;]+);", path.read_bytes())
    built = mark[1].decode() if mark else "an unknown version"
    if built.split(".")[:2] == torch.__version__.split(".")[:2]:
        return None
    return f"the C++ extension was built for torch {built}, running {torch.__version__}: reinstall zs3fast"
