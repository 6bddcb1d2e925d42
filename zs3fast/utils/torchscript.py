"""The tensors of a TorchScript archive, read without running any of its code.

An archive is a zip file: `data.pkl` says which tensors hang where in the module, `data/*` holds their bytes, `code/`
the program. Only the first two are read, by an unpickler that knows tensors and plain containers and nothing else;
modules of the program become empty records. OpenAI's own CLIP downloads (`ViT-B-16.pt`) are such archives.
"""

from __future__ import annotations

import collections
import os
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zs3fast.utils.errors import CheckpointError

_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
_LARGEST_PICKLE = 64 << 20  # bytes; tensors lie elsewhere
_DEEPEST = 100  # modules inside modules


def is_torchscript(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a TorchScript archive (and not what `torch.save` writes, which is a zip file as well)."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return _folder(archive) is not None
    except (OSError, zipfile.BadZipFile):
        return False


def read_torchscript(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Parameters and buffers of the archive's module by name, as its `state_dict()` would give them.

    Raises:
        CheckpointError: no such archive, damaged, or one that holds other things than tensors and plain containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            folder = _folder(archive)
            if folder is None:
                raise CheckpointError(f"{path}: not a TorchScript archive")
            if archive.getinfo(f"{folder}/data.pkl").file_size > _LARGEST_PICKLE:
                raise CheckpointError(f"{path}: its data.pkl is larger than any model's")
            with archive.open(f"{folder}/data.pkl") as file:
                module = _Unpickler(file, archive, folder).load()
    except CheckpointError:
        raise
    except Exception as error:  # zip files and pickles that are damaged fail in every way there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: not a readable TorchScript archive ({reason})") from None
    return dict(_named(module, "", 0))


def _folder(archive: zipfile.ZipFile) -> str | None:
    """The folder that everything in an archive lies in; None where it is no TorchScript archive."""
    names = set(archive.namelist())
    found = [name.removesuffix("/constants.pkl") for name in names if name.count("/") == 1]
    return next((top for top in found if {f"{top}/constants.pkl", f"{top}/data.pkl"} <= names), None)


class _Record:
    """A module or another object of the program: what hangs on it, none of what it does."""

    def __init__(self, *_: object) -> None:
        self.parts: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.parts = state if isinstance(state, dict) else {}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str):
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The few things that say where tensors are; the program's classes, whatever their names, become records."""
        if module == "__torch__" or module.startswith("__torch__."):
            return _Record
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("collections", "OrderedDict"): collections.OrderedDict,
            **{("torch.jit._pickle", name): list for name in _LISTS},
            **{("torch", name): _TYPES[name] for name in _TYPES},
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not read: that could run code")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """The elements [n] of a storage."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        if key not in self.storages:
            entry = self.archive.getinfo(f"{self.folder}/data/{key}")
            size = count * torch.empty((), dtype=dtype).element_size()
            if entry.file_size != size or entry.compress_type != zipfile.ZIP_STORED:  # no more than the file holds
                raise pickle.UnpicklingError(f"storage {key} has {entry.file_size} bytes, expected {size}, as they are")
            data = bytearray(self.archive.read(entry))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _rebuilt(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    if not size or 0 not in size:
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        if min(offset, *stride, *size, 0) < 0 or last >= len(storage):
            raise pickle.UnpicklingError(f"a tensor {list(size)} reaches beyond its storage of {len(storage)}")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _parameter(data: Tensor, *_: object) -> Tensor:
    return data


def _named(value: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if depth > _DEEPEST:
        raise CheckpointError(f"modules lie more than {_DEEPEST} deep in each other")
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, _Record):
        for part, inner in value.parts.items():
            yield from _named(inner, f"{name}.{part}" if name else str(part), depth + 1)
