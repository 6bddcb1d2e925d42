"""Backends, their objections to a request, and the choice between them.

An op registers, for each backend that implements it, a function and a list of objections. `auto` runs the first
backend without objections, in the order of `BACKENDS`; a backend asked for by name runs or raises. `auto` leaves a CUDA
kernel out where it was not measured faster than Triton's (_measured.py); asked for by name it runs. The choice is made
on every call below autograd, so `torch.compile` and `torch.export` see one op whatever is installed.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from zs3fast.ops import _measured

logger = logging.getLogger("zs3fast")

BACKENDS = ("cuda", "triton", "cpp", "reference")  # the order in which `auto` asks
Objections = Callable[..., list[str]]


@dataclass(frozen=True)
class Implementation:
    """One backend's version of one op. `objections` takes the same arguments as `run`; an empty list means yes."""

    run: Callable[..., Any]
    objections: Objections


_implementations: dict[str, dict[str, Implementation]] = {}
_logged: set[tuple[str, str]] = set()


def _valid(backend: str, source: str) -> str:
    if backend not in ("auto", *BACKENDS):
        choices = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"{source}: unknown backend {backend!r}, expected one of {choices}")
    return backend


_requested = _valid(os.environ.get("ZS3FAST_BACKEND", "auto"), "ZS3FAST_BACKEND")


class use_backend:
    """Choose the backend of every op, process-wide or for a `with` block.

    Args:
        backend: "auto" | "reference" | "cpp" | "triton" | "cuda".
    Raises:
        ValueError: the name is none of these. Whether a backend can take a request is known, and raised, at the call.

    >>> zs3fast.ops.use_backend("cpp")               # from here on
    >>> with zs3fast.ops.use_backend("reference"):   # here only
    ...     labels = model.predict_labels(out, size)
    """

    def __init__(self, backend: str):
        global _requested
        self._previous = _requested
        _requested = _valid(backend, "use_backend")

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _requested
        _requested = self._previous


def requested_backend() -> str:
    """The backend asked for: a name, or "auto"."""
    return _requested


def register(op: str, backend: str, run: Callable[..., Any], objections: Objections) -> None:
    """Plug `backend`'s version of `op` in. Called once, from the op's own file."""
    assert backend in BACKENDS, backend
    _implementations.setdefault(op, {})[backend] = Implementation(run, objections)


@overload
def registered(op: None = None) -> list[str]: ...
@overload
def registered(op: str) -> dict[str, Implementation]: ...
def registered(op: str | None = None) -> dict[str, Implementation] | list[str]:
    """The backends of one op, or the names of all ops."""
    return sorted(_implementations) if op is None else dict(_implementations[op])


def objections(op: str, backend: str, *args: Any) -> list[str]:
    """Why `backend` cannot take this request, or why `auto` would not give it the request; empty if neither is so."""
    implementation = _implementations[op].get(backend)
    if implementation is None:
        return ["not written for this op"]
    reasons = implementation.objections(*args)
    if not reasons and backend == "cpp" and not _has_kernel(op, "CPU"):
        return [_OLDER_THAN_THE_OP]
    if not reasons and backend == "cuda" and _requested != "cuda":
        return _unmeasured(op, *args)
    return reasons


_OLDER_THAN_THE_OP = "the extension was built before this op was written: build it again"


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"zs3fast_cpp::{op}", key)


def architecture_of(device: torch.device | None) -> str:
    """A card's, as nvcc has it: "sm_90"."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _unmeasured(op: str, *args: Any) -> list[str]:
    architecture = architecture_of(_leading_device(args))
    if _measured.faster_than_triton(op, architecture):
        return []
    return [f"not measured faster than triton on {architecture}: only use_backend('cuda') takes it"]


def choose(op: str, *args: Any) -> str:
    """The name of the backend that would run `op` on these arguments."""
    if _requested != "auto":
        reasons = objections(op, _requested, *args)
        if reasons:
            raise RuntimeError(_refusal(op, _requested, reasons, args))
        return _requested
    return _first_willing(op, args)


def call(op: str, *args: Any) -> Any:
    """Run `op` on the backend that `choose` names."""
    backend = choose(op, *args)
    if (op, backend) not in _logged:
        _logged.add((op, backend))
        logger.info("%s runs on the %s backend", op, backend)
    with _device_of(args):
        return _implementations[op][backend].run(*args)


def _device_of(args: tuple[Any, ...]) -> AbstractContextManager[object]:
    """The GPU of the tensors made current: kernels start on the current one."""
    device = _leading_device(args)
    return torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext()


def _leading_device(args: tuple[Any, ...]) -> torch.device | None:
    return next((a.device for a in args if isinstance(a, Tensor)), None)


def _first_willing(op: str, args: tuple[Any, ...]) -> str:
    for backend in BACKENDS:
        if backend == "cuda" and op not in _measured.SPEEDUP_OVER_TRITON:
            continue  # without asking: this is on the path of every call
        if not objections(op, backend, *args):
            return backend
    raise AssertionError(f"{op}: the reference backend must take every request that passed the checks")


def _refusal(op: str, backend: str, reasons: list[str], args: tuple[Any, ...]) -> str:
    tensors = ", ".join(f"{list(a.shape)} {str(a.dtype)[6:]} {a.device}" for a in args if isinstance(a, Tensor))
    instead = _first_willing(op, args)
    return f"{op}: backend {backend!r} cannot take this request: {'; '.join(reasons)} ({instead} would run {tensors})"


def never(*_args: Any) -> list[str]:
    """The reference's objections: none."""
    return []


def tensor_objections(tensor: Tensor, device: str, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """Objections to one tensor's device type and dtype."""
    reasons = []
    if tensor.device.type != device:
        reasons.append(f"runs on {device} tensors, not {tensor.device.type}")
    if tensor.dtype not in dtypes:
        built = ", ".join(str(d)[6:] for d in dtypes)
        reasons.append(f"{str(tensor.dtype)[6:]} not built ({built})")
    return reasons


def cpp_objections(tensor: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[str]:
    """Objections of the compiled CPU extension to a request led by `tensor`."""
    from zs3fast.ops import _extension

    return _extension.objections() + tensor_objections(tensor, "cpu", dtypes)


def cuda_objections(
    op: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16),
) -> list[str]:
    """Objections of the CUDA C++ kernels of the compiled extension to a request led by `tensor`."""
    from zs3fast.ops import _extension

    reasons = tensor_objections(tensor, "cuda", dtypes) + _extension.objections()
    if reasons:
        return reasons
    archs = [arch for arch in _extension.module().cuda_archs.split(",") if arch]
    if not archs:
        return ["the extension was built without CUDA (ZS3FAST_CUDA=1 says why)"]
    major, minor = torch.cuda.get_device_capability(tensor.device)
    if not any(_runs_on(arch, major, minor) for arch in archs):
        built = ", ".join(f"sm_{arch}" for arch in archs)
        return [f"built for {built}, not for this card's sm_{major}{minor} (ZS3FAST_CUDA_ARCHS)"]
    return [] if _has_kernel(op, "CUDA") else [_OLDER_THAN_THE_OP]


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether machine code for `arch`, "80" or "90a", runs on compute capability major.minor: "a" is for it alone."""
    number = int(arch.rstrip("af"))
    same_major = number // 10 == major
    return same_major and (number % 10 == minor if arch.endswith("a") else number % 10 <= minor)


def triton_objections(
    tensor: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
) -> list[str]:
    """Objections of the Triton kernels. Without a GPU they run in Triton's interpreter only, and only if asked for."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1" and _requested == "triton"
    reasons = tensor_objections(tensor, "cpu" if interpreting and tensor.device.type == "cpu" else "cuda", dtypes)
    if not reasons and importlib.util.find_spec("triton") is None:  # importing it takes 70 MB
        return ["triton is not installed"]
    return reasons
