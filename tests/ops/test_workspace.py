"""The memory that a thread keeps between calls of CPU kernels (csrc/workspace.h)."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import pytest

from tests.ops.cxx import shared_library

SOURCE = Path(__file__).parent / "emulated" / "kept_memory.cpp"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = shared_library(tmp_path_factory.mktemp("workspace") / "kept_memory.so", [SOURCE], "-O1")
    loaded.most_kept.restype = loaded.kept.restype = ctypes.c_int64
    loaded.use.restype, loaded.use_within.restype = ctypes.c_void_p, ctypes.c_bool
    loaded.use.argtypes, loaded.use_within.argtypes = [ctypes.c_int64], [ctypes.c_int64, ctypes.c_int64]
    return loaded


def test_a_thread_keeps_what_fits_and_gives_back_the_rest_at_once(library: ctypes.CDLL) -> None:
    most = library.most_kept()
    first = library.use(1000)
    assert library.kept() == 1000
    assert library.use(10) == first and library.kept() == 1000  # smaller calls run in it
    library.use(most)
    assert library.kept() == most
    library.use(most + 1)
    assert library.kept() == 0  # an idle thread keeps no large buffer
    library.use(64)
    assert library.kept() == 64


def test_a_call_within_a_call_has_memory_of_its_own(library: ctypes.CDLL) -> None:
    most = library.most_kept()
    for outer, inner in ((1000, 1000), (1000, 5000), (5000, 10), (1000, most + 1), (most + 1, 1000)):
        assert library.use_within(outer, inner), (outer, inner)
        assert library.kept() <= most


def test_every_thread_has_its_own(library: ctypes.CDLL) -> None:
    library.use(1000)
    seen = []

    def other() -> None:
        seen.append(library.kept())
        library.use(4096)
        seen.append(library.kept())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [0, 4096] and library.kept() == 1000
