"""What would make the host wait for a device, and how it need not: checks answered later, constants copied once.

A check of values raises at once on a CPU. On another device its answer would cost the whole queue of work, so it is
sent for and read where that is through anyway:

    with collecting() as checks:       # inference: results are not handed out before they are settled
        out = predict(image)
    labels = out.labels.cpu()
    checks.settle()

Outside of such a block, and while gradients are recorded, it is read before the next step of any torch optimiser in the
same thread (or at the thread's next check, if it is there by then). Whoever checks must leave nothing to be read out of
bounds meanwhile: a device's own assertion ends the process's use of it.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MakeError = Callable[[list[int], Any], Exception]
Values = Tensor | Callable[[Tensor], Tensor]


def waits(device: torch.device) -> bool:
    """Whether reading a value from `device` waits for work that was queued there."""
    return device.type not in ("cpu", "meta")


@dataclass(frozen=True)
class _Sent:
    """An answer on its way: (is any bad, the first bad one's index in the flat tensor), and the values to name."""

    found: Tensor
    values: Tensor
    shape: torch.Size
    error: MakeError
    event: Any

    def arrived(self) -> bool:
        return self.found.device.type == "cpu" if self.event is None else bool(self.event.query())

    def read(self) -> None:
        if self.event is not None:
            self.event.synchronize()
        bad, index = self.found.tolist()
        if bad:
            raise self.error(_place(index, self.shape), _plain(self.values))


class Checks:
    """Checks whose answers have not been read."""

    def __init__(self) -> None:
        self._sent: deque[_Sent] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, bad: Tensor, values: Values, error: MakeError) -> None:
        """Send for the answer to `check`, without waiting."""
        first = bad.contiguous().view(torch.uint8).flatten().argmax()  # of equals the first
        found, named = torch.stack([bad.any().long(), first]), _named(values, first.view(1))
        event = None
        if bad.device.type == "cuda":  # into pinned memory, on the stream that computes
            found, named = (tensor.to("cpu", non_blocking=True) for tensor in (found, named))
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(bad.device))
        self._sent.append(_Sent(found, named, bad.shape, error, event))

    def settle(self, *, arrived: bool = False) -> None:
        """Wait for every answer and raise the first error, which ends the others too; `arrived`: do not wait."""
        try:
            while self._sent and (not arrived or self._sent[0].arrived()):
                self._sent.popleft().read()
        except BaseException:
            self._sent.clear()
            raise


_block: ContextVar[Checks | None] = ContextVar("zs3fast_checks", default=None)
_thread = threading.local()


@contextmanager
def collecting() -> Iterator[Checks]:
    """Within the block, checks on a device are kept for its end; whoever opens it settles them."""
    checks = Checks()
    token = _block.set(checks)
    try:
        yield checks
    finally:
        _block.reset(token)


def check(bad: Tensor, values: Values, error: MakeError) -> None:
    """Raise `error(place, value)` where anything of `bad` (bool) holds, for the first: its index, and what is there.

    On a CPU at once, else as the module says. Nothing is looked at while a graph is traced or captured.

    Args:
        values: as large as `bad`; or what gives, from the flat index int64 [1], the numbers [n] to name.
        error: its value is a number, or a list where there are several.
    """
    if torch.compiler.is_compiling() or not bad.numel() or bad.device.type == "meta":
        return
    if bad.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    block = _block.get()
    if waits(bad.device) and block is not None:
        block.send(bad, values, error)
    elif waits(bad.device) and torch.is_grad_enabled():
        mine = _of_thread()
        mine.settle(arrived=True)
        mine.send(bad, values, error)
    elif bad.any():
        first = bad.flatten().nonzero()[0]
        raise error(_place(int(first), bad.shape), _plain(_named(values, first)))


def deferred(device: torch.device) -> bool:
    """Whether a check of a tensor there is read later: what it guards must not be read out of bounds till then."""
    if torch.compiler.is_compiling() or not waits(device):
        return False
    return _block.get() is not None or torch.is_grad_enabled()


def _of_thread() -> Checks:
    """This thread's checks, which the next step of an optimiser settles."""
    _watch_optimisers()
    if not hasattr(_thread, "checks"):
        _thread.checks = Checks()
    checks: Checks = _thread.checks
    return checks


@functools.cache
def _watch_optimisers() -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
    if not torch.compiler.is_compiling() and hasattr(_thread, "checks"):
        _thread.checks.settle()


def _named(values: Values, index: Tensor) -> Tensor:
    return values.detach().flatten().index_select(0, index) if isinstance(values, Tensor) else values(index)


def _plain(values: Tensor) -> Any:
    numbers = values.tolist()
    return numbers[0] if len(numbers) == 1 else numbers


def _place(index: int, shape: Sequence[int]) -> list[int]:
    """Where the element `index` of a flat tensor lies."""
    place = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        place.append(rest)
    return place[::-1]


def constant(values: Sequence[int], device: torch.device) -> Tensor:
    """These integers, int64, on a device, where they are copied once: a copy waits for it. Not to be written to."""
    if waits(device) and not torch.compiler.is_compiling() and not _faking():
        return _copied(tuple(values), device)
    return torch.tensor(list(values), dtype=torch.int64, device=device)


def _faking() -> bool:
    """Whether tensors made now hold no memory; torch's own `detect_fake_mode` looks no further."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


@functools.lru_cache(maxsize=64)
def _copied(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int64).to(device)
