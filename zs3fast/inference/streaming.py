"""Doing several things at once and in order: work ahead on threads, copies to and from a GPU beside its kernels.

    prepare (threads) -> upload -> compute (the caller's thread) -> download -> finish

Threads are enough: Pillow, NumPy and torch give up Python's lock while they decode, resize and compress.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")
Kept = TypeVar("Kept")
Result = TypeVar("Result")
Failed = Callable[[Any, Exception], None]
ITEM_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)  # of an item that is no good; others are ours
_MOST_THREADS = 8
_item: ContextVar[Any] = ContextVar("zs3fast_item", default=None)


def default_workers(device: torch.device) -> int:
    """How many threads read ahead, and how many write behind, unless told.

    A GPU leaves the CPU's cores to them: one a core, up to 8. A CPU's model takes all cores itself for most of a
    image's time, and more threads would only take turns with it; one keeps many cores from idling while a file is
    decoded or compressed, which takes a single core. On two cores that gained nothing (`bench/folder.py`): none.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cuda":
        return 0 if cores == 1 else min(_MOST_THREADS, cores)
    return 0 if cores <= 2 else 1


def current_item() -> Any:
    """What the code that runs now works on, see `working_on`; None outside. Tells whose warning it is."""
    return _item.get()


@contextmanager
def working_on(item: Any) -> Iterator[None]:
    """Within the block, `current_item` is `item`, for this thread."""
    token = _item.set(item)
    try:
        yield
    finally:
        _item.reset(token)


def ahead(
    items: Iterable[Item], work: Callable[[Item], Result], workers: int
) -> Generator[tuple[Item, Future[Result]], None, None]:
    """Every item with the outcome of `work(item)`, in order, while threads work on the items that follow.

    Args:
        items: drawn in the caller's thread, `workers` more than were handed out.
        work: called on a thread. What it raises is raised again by the outcome's `result()`, and ends nothing else.
        workers: threads, and items begun beyond the one handed out: the bound on what is held in memory. 0: no threads,
            each item is worked on when it is asked for.

    When the generator is closed, or an interrupt passes through it, work not begun is dropped; work under way is let
    finish, so that it leaves nothing half done.
    """
    if workers == 0:
        for item in items:
            yield item, _done(work, item)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="zs3fast")
    pending: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(_work, work, item)))
            if len(pending) > workers:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _work(work: Callable[[Item], Result], item: Item) -> Result:
    with working_on(item):
        return work(item)


def _done(work: Callable[[Item], Result], item: Item) -> Future[Result]:
    """The outcome of work done at once, on this thread; an interrupt is no outcome."""
    outcome: Future[Result] = Future()
    try:
        outcome.set_result(_work(work, item))
    except Exception as error:  # kept for `result()`, as an executor keeps it
        outcome.set_exception(error)
    return outcome


def grouped(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items in a row; the last may be shorter."""
    items = iter(items)
    while group := list(islice(items, size)):
        yield group


def overlapped(
    items: Iterable[Item],
    prepare: Callable[[Item], tuple[Kept, Tensor | None]],
    compute: Callable[[list[tuple[Kept, Tensor | None]]], list[tuple[Tensor, ...]]],
    finish: Callable[..., Result],
    *,
    device: torch.device,
    workers: int,
    batch_size: int = 1,
    failed: Failed | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Every item with its result, in order; while one is computed the next are prepared and, on a GPU, copied.

    Args:
        prepare: item -> (what is kept of it, a tensor on the host or None), on a thread.
        compute: `batch_size` of these, their tensors on the device, -> tensors on the device for each.
        finish: what was kept, and the computed tensors as arrays -> the result.
        workers: see `ahead`.
        failed: told of an item whose preparation, computation or end raises one of `ITEM_ERRORS`, and the rest goes
            on. None: that is raised. A batch that fails is computed again item by item.
    """
    transfers = Transfers(device)

    def begin(item: Item) -> tuple[Kept, Callable[[], Tensor | None]]:
        kept, tensor = prepare(item)
        return kept, transfers.upload(tensor)

    def computed(group: list[_Begun]) -> list[tuple[Item, Kept, Callable[[], list[np.ndarray]]]]:
        try:
            with working_on(group[0][0]):
                results = compute([(kept, uploaded()) for _, kept, uploaded in group])
        except ITEM_ERRORS as error:
            if len(group) == 1:
                _report(failed, group[0][0], error)
                return []
        else:
            return [
                (item, kept, transfers.download(*tensors))
                for (item, kept, _), tensors in zip(group, results, strict=True)
            ]
        return [one for member in group for one in computed([member])]

    def finished(item: Item, kept: Kept, arrays: Callable[[], list[np.ndarray]]) -> list[tuple[Item, Result]]:
        try:
            with working_on(item):
                return [(item, finish(kept, *arrays()))]
        except ITEM_ERRORS as error:
            _report(failed, item, error)
            return []

    copying: deque[tuple[Item, Kept, Callable[[], list[np.ndarray]]]] = deque()
    with closing(ahead(items, begin, workers)) as outcomes:
        for group in grouped(_begun(outcomes, failed), batch_size):
            copying.extend(computed(group))
            # A GPU is given its next items before the results of the last ones are waited for.
            while len(copying) > (len(group) if transfers.stream else 0):
                yield from finished(*copying.popleft())
        while copying:
            yield from finished(*copying.popleft())


_Begun = tuple[Any, Any, Callable[[], Tensor | None]]


def _begun(outcomes: Iterable[tuple[Item, Future[Any]]], failed: Failed | None) -> Iterator[_Begun]:
    """The items whose preparation went well."""
    for item, outcome in outcomes:
        try:
            kept, uploaded = outcome.result()
        except ITEM_ERRORS as error:
            _report(failed, item, error)
        else:
            yield item, kept, uploaded


def _report(failed: Failed | None, item: Any, error: Exception) -> None:
    if failed is None:
        raise error
    failed(item, error)


class Transfers:
    """Copies between the host and a device, which on a GPU go on beside its kernels.

    On a GPU they have a stream of their own and pinned memory on the host's side; events order them with the stream
    that computes. On a CPU nothing is copied. The GPU's branches have not run on a GPU so far;
    `tests/gpu/test_pipeline.py` is what to run there.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def upload(self, tensor: Tensor | None) -> Callable[[], Tensor | None]:
        """Start copying to the device; any thread may. The result, called where the tensor is needed, gives it."""
        if self.stream is None or tensor is None:
            return lambda: tensor
        with torch.cuda.stream(self.stream):
            copy = tensor.pin_memory().to(self.device, non_blocking=True)
            copied = self.stream.record_event()

        def arrived() -> Tensor:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(copied)
            copy.record_stream(computing)  # its memory is not for others before that stream is through with it
            return copy

        return arrived

    def download(self, *tensors: Tensor) -> Callable[[], list[np.ndarray]]:
        """Start copying results to the host. The result, called where they are needed, waits for them."""
        if self.stream is None:
            return lambda: [tensor.cpu().numpy() for tensor in tensors]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            for tensor in tensors:
                tensor.record_stream(self.stream)
            copied = self.stream.record_event()

        def arrived() -> list[np.ndarray]:
            copied.synchronize()
            return [copy.numpy().copy() for copy in copies]  # a result may be kept for long, pinned memory is scarce

        return arrived
