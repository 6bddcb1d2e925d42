"""NumPy's files, read without trust: plain numbers or strings alone, and no more memory than the file has bytes for."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from zs3fast.utils.errors import FileFormatError
from zs3fast.utils.limits import check_unpacked


def read_npy(path: str | os.PathLike[str], what: str) -> np.ndarray:
    """The array of a .npy file.

    Args:
        what: the argument that the file was given as; errors begin with it.
    Raises:
        FileNotFoundError: no such file.
        FileFormatError (a ValueError): cut off, damaged, of Python objects, or of another size than it says.
    """
    path, name = _existing(path, what)
    with _readable(f"{name} is not a whole .npy file of plain numbers"), open(path, "rb") as file:
        return _array(file, path.stat().st_size)


def read_npz(path: str | os.PathLike[str], what: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name; see `read_npy`. What they unpack to is compared with the limit first."""
    path, name = _existing(path, what)
    with _readable(f"{name} is not a readable .npz file of plain arrays"), zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
        check_unpacked(sum(entry.file_size for entry in entries), name, "its arrays", least=2 * path.stat().st_size)
        arrays = {}
        for entry in entries:
            with archive.open(entry) as file:
                arrays[entry.filename.removesuffix(".npy")] = _array(file, entry.file_size)
        return arrays


def _existing(path: str | os.PathLike[str], what: str) -> tuple[Path, str]:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{what}: no file {path}")
    if not path.is_file():
        raise FileFormatError(f"{what}: {path} is {'a folder' if path.is_dir() else 'no plain file'}, expected arrays")
    return path, f"{what}: {path}"


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Whatever damaged bytes make NumPy, zipfile and zlib raise (TokenErrors too), as one error that begins so."""
    try:
        yield
    except FileFormatError:
        raise
    except MemoryError:
        raise FileFormatError(f"{what} (there is not enough memory for what it holds)") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileFormatError(f"{what} ({reason})") from None


def _array(file: IO[bytes], size: int) -> np.ndarray:
    """The array in `file`, which has `size` bytes: they are compared with what the header claims before it is read."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version[0]}.{version[1]}, expected 1.0 to 3.0")
    # 3.0 differs from 2.0 in the encoding of the names of fields, which plain arrays have none of.
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject or dtype.kind not in "biufcSU":
        raise ValueError(f"it holds {dtype}")
    claimed = dtype.itemsize
    for side in shape:
        claimed *= side
    if claimed < 0 or claimed > size:
        raise ValueError(f"it says {list(shape)} {dtype}, which is {claimed} bytes, and has {size}")
    data = file.read(claimed)
    if len(data) < claimed:
        raise ValueError(f"cut off, it has {len(data)} bytes of {claimed}")
    return np.frombuffer(bytearray(data), dtype).reshape(shape, order="F" if fortran else "C")
