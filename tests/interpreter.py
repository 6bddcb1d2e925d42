"""Whether Triton's interpreter runs at all with the NumPy that is installed.

The interpreter of Triton 3.6 does not with NumPy 2.4 and newer: it takes arrays of one element for numbers. What it
breaks says nothing of a kernel, so tests that end in it are skipped with this as the reason.
"""

from __future__ import annotations

import functools
import os
import traceback

import torch


@functools.cache
def failure() -> str | None:
    """Why a kernel of a loop, a load and a store does not run in the interpreter; None where it does."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None
    import numpy
    import triton

    from tests.interpreter_kernel import add_up_kernel

    x, total = torch.arange(8.0), torch.zeros(1)
    try:
        add_up_kernel[(1,)](x, total, 2, BLOCK=4)
    except Exception as error:
        return f"Triton {triton.__version__}'s interpreter does not run with NumPy {numpy.__version__}: {error}"
    assert total.item() == 28
    return None


def ends_in_interpreter(error: BaseException) -> bool:
    """Whether an exception, or what it came from, was raised under a kernel that is interpreted."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    frames = [frame for each in chain for frame in traceback.extract_tb(each.__traceback__)]
    return any(frame.filename.replace(os.sep, "/").endswith("triton/runtime/interpreter.py") for frame in frames)
