"""FLOP formulas of the ops, handed to torch.utils.flop_counter when somebody imports it.

Importing it from here would bring triton along, 76 MB and 70 ms, to everybody who never counts.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]  # what a formula gets in place of a tensor
_waiting: list[tuple[Any, Callable[..., int]]] = []

PER_INTERPOLATED = 8  # FLOPs of a bilinear interpolation: 4 multiply-adds


def register(packet: Any, formula: Callable[..., int]) -> None:
    """FlopCounterMode counts formula(*arguments, shapes in place of tensors) for each call of an op of `packet`."""
    counter = sys.modules.get(_COUNTER)
    if counter is not None:
        _hand_over(counter, packet, formula)
        return
    if not _waiting:
        sys.meta_path.insert(0, _AfterImport())
    _waiting.append((packet, formula))


def _hand_over(counter: ModuleType, packet: Any, formula: Callable[..., int]) -> None:
    if packet in counter.flop_registry:  # torch's own op, which a newer torch counts itself
        return
    counter.register_flop_formula(packet)(lambda *args, out_shape=None, **_: formula(*args))


class _AfterImport:
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_hand_over(module: ModuleType) -> None:
            load(module)
            while _waiting:
                _hand_over(module, *_waiting.pop())

        spec.loader.exec_module = load_and_hand_over  # type: ignore[method-assign]  # this loader's alone
        return spec


def attention(queries: int, keys: int, heads: int, width: int, products: int) -> int:
    """FLOPs of `products` products between [heads, queries, width] and [heads, keys, width]."""
    return 2 * products * heads * queries * keys * width
