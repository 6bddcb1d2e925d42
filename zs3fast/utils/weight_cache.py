"""Results that depend on weights (and class lists) alone, kept until one of them changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class WeightCache:
    """Holds one result, computed from given tensors, until any of them is another tensor or was written to.

    Nothing is kept while gradients are recorded or a graph is traced or captured, or for tensors born in inference
    mode, whose writes torch does not count. Writes through `.data` are invisible to torch too: call `clear` after them.
    Threads may share one: each gets the result of its own tensors.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        # One tuple, read and replaced whole: stamp, sources and value of different calls never meet.
        self._kept: tuple[list[tuple[Any, ...]], list[weakref.ref[Tensor]], Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCache:
        return WeightCache()

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()

    def get(self, sources: Iterable[Tensor], compute: Callable[[], Any]) -> Any:
        """`compute()`, or its earlier result if no tensor of `sources` has changed since."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return compute()
        sources = list(sources)
        kind = sources[0].device.type
        if kind == "cuda" and torch.cuda.is_current_stream_capturing():
            return compute()  # a replay reads what the weights and the class list are then
        if any(source.is_inference() for source in sources) or (kind != "meta" and torch.is_autocast_enabled(kind)):
            return compute()
        stamp = [(source._version, source.data_ptr(), source.device, source.dtype) for source in sources]
        kept = self._kept
        if kept is not None and kept[0] == stamp and all(ref() is source for ref, source in zip(kept[1], sources)):
            return kept[2]
        value = compute()
        self._kept = stamp, [weakref.ref(source) for source in sources], value
        return value
