"""self_similarity_attention: the last block of training-free methods, q meeting q and k meeting k (SCLIP, NACLIP).

    S_l    = scale * l r^T + omega           for the pairs (l, r) of `similarity`: (q, q), (k, k), both, or (q, k)
    output = sum over the pairs of softmax(S_l) v                                           patch rows alone
    omega  = exp(-((y_i - y_j)^2 + (x_i - x_j)^2) / (2 std^2)) between patches i and j, 0 where a prefix token is one

Nothing of size T x T is stored, T = num_prefix + N. omega is separable, a[|y_i - y_j|] * b[|x_i - x_j|], by tables of h
and w. qq+kk is one pass over the keys with two online softmaxes, which share each tile of v. Floor: 4 H T N dh
FLOPs a pair and image, and (3 T + N) H dh elements moved; the plain structure stores 3 H T^2 floats a pair, 2.3 GiB at
N = 4096 with 12 heads, and omega itself another 64 MiB.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.ops import _dispatch, _matmul

OP = "self_similarity_attention"
_PAIRS = {"qq": ("qq",), "kk": ("kk",), "qq+kk": ("qq", "kk"), "qk": ("qk",)}
SIMILARITIES = tuple(_PAIRS)


def distance_prior(
    grid: tuple[int, int], std: float, num_prefix: int = 1, *, device: torch.device | None = None
) -> Tensor:
    """omega [T, T] in full, float64: 1 between a patch and itself, 0 to and from the prefix (NACLIP section 3.2)."""
    h, w = grid
    y, x = (torch.arange(n, dtype=torch.float64, device=device) for n in (h, w))
    a, b = (torch.exp(-(t[:, None] - t).square() / (2 * std * std)) for t in (y, x))
    omega = (a[:, None, :, None] * b[None, :, None, :]).reshape(h * w, h * w)
    return F.pad(omega, (num_prefix, 0, num_prefix, 0))


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    similarity: str,
    scale: float,
    grid: tuple[int, int],
    num_prefix: int = 1,
    std: float | None = None,
) -> Tensor:
    """The definition, with every score stored: see `self_similarity_attention`."""
    tokens = {"q": q, "k": k}
    parts = [
        _probabilities(tokens[left], tokens[right], scale, grid, num_prefix, std) @ v
        for left, right in _PAIRS[similarity]
    ]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _probabilities(
    left: Tensor, right: Tensor, scale: float, grid: tuple[int, int], num_prefix: int, std: float | None
) -> Tensor:
    """softmax(scale * left right^T + omega) of the patch rows, [B, heads, N, T]."""
    scores = (left[:, :, num_prefix:] @ right.mT) * scale
    if std is not None:
        scores = scores + distance_prior(grid, std, num_prefix, device=left.device)[num_prefix:].to(scores.dtype)
    return scores.softmax(-1)


def self_similarity_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    similarity: str,
    scale: float,
    grid: tuple[int, int],
    num_prefix: int = 1,
    std: float | None = None,
) -> Tensor:
    """Attention of patches by the likeness of queries, of keys or of both, with a prior for near patches.

    output = sum over pairs (l, r) of softmax(scale * l r^T + omega) v,
    omega  = exp(-(dy^2 + dx^2) / (2 std^2)) between patches, 0 at prefix tokens

    Args:
        q, k, v:    [B, heads, T, dh], T = num_prefix + h * w: prefix tokens, then patches row by row. B = 0 gives an
                    empty result.
        similarity: "qq", "kk", "qk", or "qq+kk", the sum of two attentions, not halved (SCLIP).
        scale:      factor on the products, usually dh ** -0.5; omega is added after it.
        grid:       (h, w) patches.
        num_prefix: tokens before the patches: keys and values like any other, but not queries.
        std:        of the prior, in patches, above 0; None: no prior.
    Returns:
        [B, heads, N, dh], patch queries alone, lying in memory as [B, N, heads, dh] so that joining the heads is free.
        Differentiable in q, k and v, once; the backward pass stores the scores.
    Source: SCLIP (ECCV 2024), ClearCLIP (ECCV 2024), NACLIP (WACV 2025); RCS of ResCLIP (CVPR 2025) is a sum of these.
    """
    _check(q, k, v, similarity, scale, grid, num_prefix, std)
    q, k, v = _matmul.autocast(q, k, v)
    return torch.ops.zs3fast.self_similarity_attention(q, k, v, similarity, scale, tuple(grid), num_prefix, std)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    similarity: str,
    scale: float,
    grid: tuple[int, int],
    num_prefix: int,
    std: float | None,
) -> None:
    for label, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{OP}: {label}: expected a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{OP}: {label}: expected floating point, got {x.dtype}")
        if x.ndim != 4:
            raise ValueError(f"{OP}: {label}: expected [B, heads, tokens, dh], got shape {list(x.shape)}")
        if x.dtype != q.dtype and not _matmul.autocasting(q):
            raise TypeError(f"{OP}: {label}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{OP}: {label}: expected q's device {q.device}, got {x.device}")
    if similarity not in SIMILARITIES:
        raise ValueError(f"{OP}: similarity: expected one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    if not _is_number(scale):
        raise TypeError(f"{OP}: scale: expected a number, got {type(scale).__name__}")
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(map(_is_int, grid)):
        raise TypeError(f"{OP}: grid: expected two ints (h, w), got {grid!r}")
    if grid[0] < 1 or grid[1] < 1:
        raise ValueError(f"{OP}: grid: expected at least (1, 1), got {tuple(grid)}")
    if not _is_int(num_prefix):
        raise TypeError(f"{OP}: num_prefix: expected an int, got {type(num_prefix).__name__}")
    if num_prefix < 0:
        raise ValueError(f"{OP}: num_prefix: expected 0 or more, got {num_prefix}")
    if std is not None:
        if not _is_number(std):
            raise TypeError(f"{OP}: std: expected a number or None, got {type(std).__name__}")
        if not 0 < std < math.inf:
            raise ValueError(f"{OP}: std: expected a positive number of patches, got {std}")
    B, heads, _, dh = q.shape
    tokens = num_prefix + grid[0] * grid[1]
    if heads < 1 or dh < 1 or q.shape[2] != tokens:
        raise ValueError(
            f"{OP}: q: expected [B, heads, {tokens}, dh], {num_prefix} prefix tokens and {grid[0]} x {grid[1]} "
            f"patches, got shape {list(q.shape)}"
        )
    for label, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{OP}: {label}: expected q's shape {list(q.shape)}, got {list(x.shape)}")


def _is_int(n: object) -> bool:
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool)


def _is_number(n: object) -> bool:
    return isinstance(n, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(n, bool)


# --- torch.library ---------------------------------------------------------------------------------------------------

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, str similarity, float scale, SymInt[2] grid, SymInt num_prefix, float? std)"
    " -> Tensor"
)
for _namespace in ("zs3fast", "zs3fast_cpp"):
    torch.library.define(f"{_namespace}::{OP}", _SCHEMA)


@torch.library.impl(f"zs3fast::{OP}", "default")
def _run(*args):
    return _dispatch.call(OP, *args)


def _empty(v: Tensor, num_prefix: int) -> Tensor:
    """[B, heads, N, dh] lying in memory as [B, N, heads, dh]: joining the heads is a view."""
    return v.new_empty(v.shape[0], v.shape[2] - num_prefix, v.shape[1], v.shape[3]).transpose(1, 2)


@torch.library.register_fake(f"zs3fast::{OP}")
def _fake(q, k, v, similarity, scale, grid, num_prefix, std):
    return _empty(v, num_prefix)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.arguments = inputs[3:]


def _autograd(ctx, grad_output):
    """dS = P (dP - sum P dP) * scale for each pair, with its scores stored; half types accumulate in fp32."""
    similarity, scale, grid, num_prefix, std = ctx.arguments
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in ctx.saved_tensors)
    grad = grad_output.to(q.dtype)
    tokens, grads, dv = {"q": q, "k": k}, {"q": torch.zeros_like(q), "k": torch.zeros_like(k)}, torch.zeros_like(v)
    for left, right in _PAIRS[similarity]:
        p = _probabilities(tokens[left], tokens[right], scale, grid, num_prefix, std)
        dp = grad @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dv = dv + p.mT @ grad
        patch_rows = F.pad(ds @ tokens[right], (0, 0, num_prefix, 0))
        grads[left] = grads[left] + patch_rows
        grads[right] = grads[right] + ds.mT @ tokens[left][:, :, num_prefix:]
    return *(x.to(grad_output.dtype) for x in (grads["q"], grads["k"], dv)), None, None, None, None, None


torch.library.register_autograd(f"zs3fast::{OP}", _autograd, setup_context=_setup_context)


# --- backends --------------------------------------------------------------------------------------------------------


def _reference_run(q, k, v, similarity, scale, grid, num_prefix, std):
    output = _empty(v, num_prefix)
    return output.copy_(
        reference(q, k, v, similarity=similarity, scale=scale, grid=grid, num_prefix=num_prefix, std=std)
    )


def _cpp_run(*args):
    return torch.ops.zs3fast_cpp.self_similarity_attention(*args)


def _cpp_objections(q: Tensor, *_args: object) -> list[str]:
    return _dispatch.cpp_objections(q, (torch.float32, torch.float16, torch.bfloat16))


_dispatch.register(OP, "reference", _reference_run, _dispatch.never)
_dispatch.register(OP, "cpp", _cpp_run, _cpp_objections)
