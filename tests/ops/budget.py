"""The error budget of kernels: the oracle is the reference in float64 on the same, already rounded, inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def assert_within_budget(
    name: str, got: Any, reference: Callable[..., Any], *args: Any, fp32: float = 1e-5, **kwargs: Any
) -> None:
    """fp32: 1e-5 relative. Half types: twice what plain torch errs in that dtype, plus one rounding.

    `got` and what `reference` returns may be one tensor or equally long tuples, compared one by one and named name[i].
    """
    wide = _tuple(reference(*map(_double, args), **{key: _double(value) for key, value in kwargs.items()}))
    got = _tuple(got)
    assert len(got) == len(wide), f"{name}: {len(got)} results, the reference has {len(wide)}"
    plain = _tuple(reference(*args, **kwargs)) if any(g is not None and g.dtype in HALF for g in got) else wide
    for i, (g, w, p) in enumerate(zip(got, wide, plain, strict=True)):
        label = name if len(got) == 1 else f"{name}[{i}]"
        if w is None or g is None:
            assert w is None and g is None, f"{label}: got {g}, the reference has {w}"
            continue
        assert g.shape == w.shape, f"{label}: shape {tuple(g.shape)}, the reference has {tuple(w.shape)}"
        assert torch.isfinite(g).all(), f"{label}: non-finite output"
        size = w.norm().clamp_min(1e-30)
        error = ((g.double() - w).norm() / size).item()
        budget = fp32
        if g.dtype in HALF:
            budget = (2 * (p.double() - w).norm() / size).item() + torch.finfo(g.dtype).eps
        assert error <= budget, f"{label}: error {error:.2e} over budget {budget:.2e}"


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
