"""Writing files whole: under a temporary name beside the target, then renamed over it."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

_LONGEST_NAME = 255  # bytes, on every common file system
_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` when the block ends well; otherwise `path` stays as it was.

    The temporary file lies in the same folder (a rename across file systems is a copy), is hidden and keeps the suffix,
    by which writers choose their format. Missing folders are made. A file that is replaced keeps its mode, a new one
    has that of the umask. What a killed writer left is written over by the next one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = _temporary(path)
    try:
        yield temporary
        mode = _mode(path)
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # a full disk, which it does not call an OSError
            raise _as_os_error(error, path) from None
        if isinstance(error, OSError) and error.errno and error.filename in (None, os.fspath(temporary)):
            error.filename = os.fspath(path)  # the system's writers name no file, others a name nobody has heard of
        raise
    finally:
        os.close(handle)


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    """What safetensors could not write, as Python says it: with the system's reason and the file's name."""
    found = re.search(r"os error (\d+)|code: (\d+)", str(error))
    code = int(found[1] or found[2]) if found else errno.EIO
    return OSError(code, os.strerror(code) if found else str(error), os.fspath(path))


def expect_folder(path: Path, name: str) -> None:
    """Raise unless files can lie in the folder `path`, which need not be there yet; `name`: the argument it is."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{name}: {place} is a file, expected a folder")
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(place))


def hidden(name: str) -> bool:
    """Whether a file's name begins with a dot: temporary files, and what macOS writes beside files (`._a.jpg`)."""
    return name.startswith(".")


def _temporary(path: Path) -> tuple[int, Path]:
    """A temporary file for `path` that no other writer uses, opened, and its name; by default always the same name."""
    first = path.with_name(_hidden_name(path, "part"))
    handle: int | None
    try:
        handle = os.open(first, _OPEN | os.O_EXCL, 0o666)
    except FileExistsError:
        handle = _taken_over(first)
    else:
        locked = lock(handle)
        if locked is False or (locked and not _is(handle, first)):  # another writer found it before it was locked
            os.close(handle)
            handle = None
    if handle is not None:
        return handle, first
    other = path.with_name(_hidden_name(path, secrets.token_hex(8)))
    return os.open(other, _OPEN | os.O_EXCL, 0o666), other


def _taken_over(path: Path) -> int | None:
    """What a killed writer left, opened and emptied; None where a living one may have it, or it is no plain file."""
    try:
        handle = os.open(path, _OPEN, 0o666)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(handle).st_mode) and lock(handle) and _is(handle, path):
        os.truncate(handle, 0)
        return handle
    os.close(handle)
    return None


def lock(handle: int) -> bool | None:
    """Lock an open file for as long as it is open: False where another has the lock, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _hidden_name(path: Path, mark: str) -> str:
    """`.STEM.MARK.SUFFIX`, the stem cut where the name would be too long: at bytes, which are what is counted."""
    suffix = path.suffix if len(os.fsencode(path.suffix)) < 64 else ""
    room = _LONGEST_NAME - len(f"..{mark}") - len(os.fsencode(suffix))
    stem = os.fsencode(path.stem)[:room].decode("utf-8", "ignore")
    return f".{stem}.{mark}{suffix}"


def _mode(path: Path) -> int | None:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return None
