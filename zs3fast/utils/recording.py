"""Whether this thread is recording a CUDA graph: there a launch costs no host time, so that fewer kernels always win.

Eagerly a small Triton kernel may cost the host more than the two kernels of torch's that it stands for. Set around the
warm-up too: what is recorded has then been compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Thread(threading.local):
    recording = False


_thread = _Thread()


@contextmanager
def recording() -> Iterator[None]:
    """Within it `is_recording` is true, in this thread alone."""
    before, _thread.recording = _thread.recording, True
    try:
        yield
    finally:
        _thread.recording = before


def is_recording() -> bool:
    """Whether what this thread runs now is being recorded, or runs to be recorded next."""
    return _thread.recording
