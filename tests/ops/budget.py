"""The error budget of kernels: the oracle is the reference in float64 on the same, already rounded, inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
TF32_EPS = 2.0**-10


def assert_within_budget(
    name: str,
    got: Any,
    reference: Callable[..., Any],
    *args: Any,
    fp32: float = 1e-5,
    roundings: int = 1,
    **kwargs: Any,
) -> None:
    """fp32: 1e-5 relative. Half types: twice what plain torch errs in that dtype, plus `roundings` of them.

    fp32 on a GPU on which torch may use tf32 is judged as the half types are, with tf32's rounding of 1e-3.
    `got` and what `reference` returns may be one tensor or equally long tuples, compared one by one and named name[i].
    """
    wide = _tuple(reference(*map(_double, args), **{key: _double(value) for key, value in kwargs.items()}))
    got = _tuple(got)
    assert len(got) == len(wide), f"{name}: {len(got)} results, the reference has {len(wide)}"
    reduced = any(g is not None and _rounding(g) is not None for g in got)
    plain = _tuple(reference(*args, **kwargs)) if reduced else wide
    for i, (g, w, p) in enumerate(zip(got, wide, plain, strict=True)):
        label = name if len(got) == 1 else f"{name}[{i}]"
        if w is None or g is None:
            assert w is None and g is None, f"{label}: got {g}, the reference has {w}"
            continue
        assert g.shape == w.shape, f"{label}: shape {tuple(g.shape)}, the reference has {tuple(w.shape)}"
        assert torch.isfinite(g).all(), f"{label}: non-finite output"
        size = w.norm().clamp_min(1e-30)
        error = ((g.double() - w).norm() / size).item()
        budget, rounding = fp32, _rounding(g)
        if rounding is not None:
            budget = (2 * (p.double() - w).norm() / size).item() + roundings * rounding
        assert error <= budget, f"{label}: error {error:.2e} over budget {budget:.2e}"


def _rounding(got: Tensor) -> float | None:
    """One rounding of a type narrower than fp32; None for the others."""
    if got.dtype in HALF:
        return torch.finfo(got.dtype).eps
    tf32 = got.is_cuda and got.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return TF32_EPS if tf32 else None


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
