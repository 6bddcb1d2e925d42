"""Tests that end in a broken interpreter are skipped; whatever else fails stays a failure."""

from __future__ import annotations

import pytest

from tests import interpreter


def _raised(path: str) -> BaseException:
    """An exception from a file of that name."""
    try:
        exec(compile("raise TypeError('only 0-dimensional arrays')", path, "exec"), {})
    except TypeError as error:
        return error
    raise AssertionError


def test_an_interpreters_error_is_known_by_its_file() -> None:
    inner = _raised("/somewhere/triton/runtime/interpreter.py")
    assert interpreter.ends_in_interpreter(inner)
    outer = RuntimeError("wrapped")
    outer.__cause__ = inner
    assert interpreter.ends_in_interpreter(outer)
    assert not interpreter.ends_in_interpreter(_raised("/somewhere/kernels/mask_loss.py"))


def test_a_kernel_runs_here_or_the_reason_names_both_versions() -> None:
    pytest.importorskip("triton")
    reason = interpreter.failure()
    if reason is not None:
        assert "Triton" in reason and "NumPy" in reason
        pytest.skip(reason)
