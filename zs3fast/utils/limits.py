"""How much memory a file may unpack to: a small file can claim any size, and is refused before it is unpacked."""

from __future__ import annotations

import os

from zs3fast.utils.errors import FileLimitError

FILE_LIMIT = "ZS3FAST_FILE_LIMIT"  # MiB
_DEFAULT = 512


def file_limit() -> int:
    """Bytes that the arrays or masks of one file may unpack to: `$ZS3FAST_FILE_LIMIT` MiB, else 512."""
    given = os.environ.get("ZS3FAST_FILE_LIMIT") or str(_DEFAULT)
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not 0 < limit < 2**40:
        raise ValueError(f"{FILE_LIMIT}: expected a number of MiB above 0, got {given!r}")
    return int(limit * 2**20)


def check_unpacked(size: int, name: str, what: str, least: int = 0) -> None:
    """Raise if `size` bytes are more than a file may unpack to.

    Args:
        name: of the file, which the message begins with.  what: what would be unpacked.
        least: bytes that are fine whatever the limit, such as those that the file itself has.
    """
    if size > max(file_limit(), least):
        raise FileLimitError(
            f"{name}: {what} would take {size / 2**20:,.0f} MiB, a file may unpack to {file_limit() / 2**20:,.0f}; set "
            f"{FILE_LIMIT} (MiB) higher if you trust it"
        )
