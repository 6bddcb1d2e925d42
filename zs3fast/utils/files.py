"""Writing files whole: under a temporary name beside the target, then renamed over it."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_mask_lock = threading.Lock()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` when the block ends well; otherwise `path` stays as it was.

    The temporary file lies in the same folder (a rename across file systems is a copy) and keeps the suffix, by which
    writers choose their format. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:100]}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, _default_mode())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _default_mode() -> int:
    """The mode `open` would have given a new file: mkstemp's are private to the user."""
    with _mask_lock:  # reading it means setting it: two threads at once could leave it at 0
        mask = os.umask(0)
        os.umask(mask)
    return 0o666 & ~mask
