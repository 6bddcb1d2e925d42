"""Weight files: the ONE safe reading (no code of a file is ever run) and the ONE strict loading.

A file's claims are compared before memory is given to them: what its tensors unpack to with its own size, and a model's
sizes, on torch's meta device, with the tensors that are there.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.serialization import safe_globals

from zs3fast.utils.errors import CheckpointError, FileFormatError
from zs3fast.utils.limits import check_unpacked
from zs3fast.utils.plain_numpy import NUMPY_GLOBALS, PlainArray
from zs3fast.utils.torchscript import is_torchscript, read_torchscript

Model = TypeVar("Model", bound=nn.Module)
WRAPPERS = ("state_dict", "model")  # keys under which training frameworks keep the tensors, opened in this order
# What DataParallel and DistributedDataParallel put before every name, and torch.compile before those of what it wraps.
_WRAPPED, _COMPILED = re.compile(r"^(module\.|_orig_mod\.)+"), re.compile(r"(?<=\.)(_orig_mod\.)+")
_SLACK = 64 << 20  # bytes that a model may hold beyond its tensors


def read_state_dict(
    path: str | os.PathLike[str], what: str = "path", *, mapped: bool = False, others: bool = False
) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file by name; wrappers and prefixes as for `unwrap_state_dict`.

    Only `torch.load(weights_only=True)` is used, which unpickles tensors, containers and plain NumPy values: a file
    with other objects is refused, and none of their code is run. Of a TorchScript archive the tensors alone are read.

    Args:
        what: the argument that a missing file was given as.
        mapped: the tensors of an archive are parts of the file, which stays where it is: for copying out of them.
        others: leave out what is no tensor, in place of refusing it.
    Raises:
        FileNotFoundError: no such file.  CheckpointError: damaged, or holding other things; the message names the file.
    """
    path = existing(path, what)
    if path.suffix == ".safetensors":
        return unwrap_state_dict(read_safetensors(path)[0], str(path))
    _check_archive(path)
    with _readable(path, "torch"), safe_globals(NUMPY_GLOBALS):
        if is_torchscript(path):
            return read_torchscript(path)
        mapped = mapped and zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    state = unwrap_state_dict(content, str(path), others)
    _check_sizes(state, path)
    return state


def read_safetensors(path: str | os.PathLike[str], what: str = "path") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    path = existing(path, what)
    with _readable(path, "safetensors"), safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def read_metadata(path: str | os.PathLike[str], what: str = "path") -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors."""
    path = existing(path, what)
    with _readable(path, "safetensors"), safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def existing(path: str | os.PathLike[str], what: str = "path") -> Path:
    """`path`, if it is a file."""
    path = Path(path)
    if not path.is_file():
        if path.exists():
            raise CheckpointError(f"{path}: is {'a folder' if path.is_dir() else 'no plain file'}, expected weights")
        raise FileNotFoundError(f"{what}: no file {path}")
    return path


def unwrap_state_dict(content: Any, source: str, others: bool = False) -> dict[str, Tensor]:
    """Named tensors out of what a training framework saved.

    {"state_dict": ...} and {"model": ...} are opened, NumPy arrays are taken as tensors, and names are those of
    `plain_name`.

    Args:
        others: leave out what is no tensor.
    Raises:
        CheckpointError: no dict of named tensors, or two of one name.
    """
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        got = "an empty one" if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{source}: expected a state dict of named tensors, got {got}")
    state: dict[str, Tensor] = {}
    odd: list[Any] = []
    for key, value in content.items():
        value = _tensor(value)
        if not isinstance(key, str) or value is None:
            odd.append(key)
            continue
        name = plain_name(key)
        if name in state:
            raise CheckpointError(f"{source}: two tensors are named {name!r}, one of them as {key!r}")
        state[name] = value
    if odd and not others:
        raise CheckpointError(f"{source}: entries that are not named tensors: {odd[:5]}")
    return state


def plain_name(name: str) -> str:
    """A parameter's name without what DistributedDataParallel and torch.compile put into it, once or nested."""
    return _COMPILED.sub("", _WRAPPED.sub("", name))


def plain_module(model: nn.Module) -> nn.Module:
    """The model itself, out of torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def strict_load(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    optional: Callable[[str], bool] = lambda name: False,
    spare: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """Load every weight of a model, each in the model's own dtype, or raise with three lists and change nothing.

    Args:
        source: what the message begins with.
        optional: names of the model that may be missing and stay as they are.
        spare: names that the model does not have and that are left out.
    Returns:
        the names that were left out, sorted.
    Raises:
        CheckpointError: missing, unexpected, or of another shape.
    """
    own = model.state_dict()
    compare(own, state, source, optional=optional, spare=spare)
    model.load_state_dict({n: tensor.to(own[n].dtype) for n, tensor in state.items() if n in own}, strict=False)
    return sorted(state.keys() - own.keys())


def compare(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    source: str,
    *,
    optional: Callable[[str], bool] = lambda name: False,
    spare: Callable[[str], bool] = lambda name: False,
    model: str = "the model",
) -> None:
    """Raise a CheckpointError with three lists unless the tensors fit; the arguments are those of `strict_load`."""
    missing = sorted(name for name in own.keys() - state.keys() if not optional(name))
    unexpected = sorted(name for name in state.keys() - own.keys() if not spare(name))
    shapes = [
        f"{name} {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(report(source, missing, unexpected, shapes, model))


def report(source: str, missing: list[str], unexpected: list[str], shapes: list[str], model: str = "the model") -> str:
    """One message for a checkpoint that does not fit."""
    lines = [f"{source}: the weights do not fit {model}"]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)):
        shown = ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")
        lines.append(f"  {title} ({len(names)}): {shown or 'none'}")
    return "\n".join(lines)


def sketch(build: Callable[[], Model], state: Iterable[Tensor], source: str) -> Model:
    """The model that `build` makes, on the meta device, where tensors have shapes and no memory.

    Args:
        build: a constructor whose sizes come from a file.
        state: the tensors of the file, which the model should be made of.
    Raises:
        CheckpointError: the model grows far beyond these tensors; its sizes are wrong. Errors of `build` pass.
    """
    tensors = list(state)
    held = sum(tensor.numel() * max(tensor.element_size(), 4) for tensor in tensors)
    with _Budget(4 * len(tensors) + 4096, 4 * held + _SLACK, source), torch.device("meta"):
        return build()


def _drawn(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of a call on the meta device, where drawing and adding nothing has PyTorch import its compiler.

    That takes a second and 250 MB; what a model's constructor does to its weights needs none of it.
    """
    if func in (torch.randn, torch.rand):
        return torch.empty(*args, **kwargs)
    if func in (Tensor.normal_, Tensor.triu_, nn.init.normal_):
        return args[0] if args else kwargs["tensor"]
    if func in _PLAIN and not kwargs:
        shape = np.broadcast_shapes(*(tuple(x.shape) for x in args if isinstance(x, Tensor)))
        return torch.empty(shape, dtype=torch.result_type(*args))
    return func(*args, **kwargs)


class _Budget(TorchFunctionMode):
    """Ends the building of a model, on this thread, that makes more tensors, or larger ones, than it should."""

    def __init__(self, tensors: int, size: int, source: str) -> None:
        super().__init__()
        self.tensors, self.size, self.source = tensors, size, source

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _drawn(func, args, kwargs or {})
        if isinstance(result, Tensor) and result._base is None:
            if func in _FACTORIES:
                self.tensors -= 1
                self.size -= result.numel() * result.element_size()
            if self.tensors < 0 or self.size < 0:
                raise CheckpointError(
                    f"{self.source}: its sizes are those of a far larger model than its tensors can fill"
                )
        return result


_PLAIN = {Tensor.add, Tensor.mul}
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand, torch.full, torch.arange, torch.linspace}


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Errors of reading a file as one that names it; the libraries let out all kinds on damaged bytes."""
    try:
        yield
    except FileFormatError:
        raise
    except MemoryError:
        raise CheckpointError(f"{path}: not enough memory for what the file holds") from None
    except Exception as error:
        text = " ".join(str(error).split())
        if kind == "torch" and "weights_only" in text.lower() and "global" in text.lower():
            lines = str(error).splitlines()
            reason = next((line for line in lines if "GLOBAL" in line or "global" in line), lines[0]).strip()
            raise CheckpointError(
                f"{path}: holds pickled objects other than tensors and is not loaded, since that could run code "
                f"({reason.split('. Please use')[0][:300]})"
            ) from None
        if "weights_only" in text:  # torch's advice is to run the file's code
            text = "its pickle is damaged, or it is none"
        raise CheckpointError(
            f"{path}: not a readable {kind} file, truncated perhaps ({type(error).__name__}: {text[:300]})"
        ) from None


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to far more than it is; torch itself stores without compression."""
    with _readable(path, "torch"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            check_unpacked(size, str(path), "the archive", least=2 * path.stat().st_size)


def _check_sizes(state: dict[str, Tensor], path: Path) -> None:
    """Refuse tensors that claim more elements than the file has bytes for: views of one element, repeated."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    check_unpacked(size, str(path), "its tensors", least=2 * path.stat().st_size)


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, PlainArray):
        value = value.array
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(value)
        except TypeError:  # strings, dates
            return None
    return value if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta else None
