"""Shared by every test: Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch

from tests import interpreter

os.environ["COLUMNS"] = "200"  # what is printed is not cut, whichever test makes the console first
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test that ends in an interpreter that cannot run any kernel is skipped and says why."""
    try:
        return (yield)
    except Exception as error:
        if interpreter.ends_in_interpreter(error) and (reason := interpreter.failure()):
            pytest.skip(reason)
        raise
