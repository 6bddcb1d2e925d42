"""`zs3fast`, and `python -m zs3fast`: the command, which an interrupt ends with 130 and one word whenever it comes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any


def main() -> None:
    """Run the command line; never returns."""
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background jobs do not
    if listens:
        signal.signal(signal.SIGINT, _leave)
    from zs3fast.cli import run

    sys.unraisablehook = _interrupt_again
    if listens:
        signal.signal(signal.SIGINT, _strike)
    code: object = 1
    try:
        code = run()
    finally:
        if code not in (0, None, 130) and _again:  # an import that lost the interrupt broke what came after it
            _leave(signal.SIGINT, None)
    for again in _again:
        again.cancel()
    sys.stdout.flush()
    if listens:
        signal.signal(signal.SIGINT, _leave)
    exec("pass")  # Python kills itself at the end if an interrupt once struck in an `exec`; the next one forgets it
    sys.exit(code)


_again: list[threading.Timer] = []


def _strike(number: int, frame: FrameType | None) -> None:
    """A KeyboardInterrupt, and once more if it strikes an import: PyTorch's own loses what NumPy's raises."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _again.append(threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]))
            _again[-1].daemon = True
            _again[-1].start()
            break
        frame = frame.f_back
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: before the command has begun, or after it has ended, there is nothing to tidy up.

    Libraries turn a KeyboardInterrupt that strikes while they load into other errors, or lose it.
    """
    os.write(2, b"interrupted\n")
    os._exit(130)


def _interrupt_again(lost: Any) -> None:
    """An interrupt that struck where Python lets no error out (a finaliser, a callback of C) strikes once more."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, signal.raise_signal, [signal.SIGINT]).start()  # at once, it would be lost here too
    else:
        sys.__unraisablehook__(lost)


if __name__ == "__main__":
    main()
