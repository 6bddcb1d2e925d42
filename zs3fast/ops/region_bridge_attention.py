"""region_bridge_attention: attention of an encoder whose region tokens each see one window (CLIP-RC section 3.2).

Tokens are [prefix: global and prompts | h * w patches | rh * rw regions]. Region (a, b) owns the window of
floor(h / rh) x floor(w / rw) patches with its top left corner at (a floor(h / rh), b floor(w / rw)); the margin that is
left over on the right and at the bottom belongs to no region. A query attends to (and the mask is symmetric):

    prefix  every prefix token and every patch, no region
    patch   every prefix token and every patch, and its own region token if it has one
    region  the patches of its own window and itself

so E x E scores are never needed. With P prefix tokens (Pq of them queries), N = h w and M = rh rw:

    1. prefix and patch rows: plain attention over the P + N keys, with log-sum-exp l_i
    2. patch i of region m:   s = scale q_i . k_m,  l' = logaddexp(l_i, s),  o_i <- e^(l_i - l') o_i + e^(s - l') v_m
    3. region rows:           attention over their window and themselves

Floor of the forward pass: 4 B heads dh ((Pq + N)(P + N) + 2 N + M) FLOPs and B heads dh (2 Eq + 2 E) elements moved.
At B = 1, heads = 12, dh = 64, N = 1024, P = 11: 3.29 GFLOP at M = 16 and 3.30 at M = 1024 (dense: 3.39 and 13.0), and
12.9 MB and 25.3 MB in fp32 (the dense probabilities alone: 53 and 203 MB). The backward pass recomputes the scores from
the saved log-sum-exp: 10 B heads dh FLOPs a pair instead of 4. With l' and the final output in the place of their
own, step 1's backward is the plain one: its probabilities are exp(s_ij - l'_i), its correction o_i . do_i.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from zs3fast.ops import _dispatch, _matmul, _mma

OP = "region_bridge_attention"


def region_of_patch(grid: tuple[int, int], regions: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Region index of every patch, int64 [h * w], -1 in the margin."""
    (h, w), (rh, rw) = grid, regions
    row = torch.arange(h, device=device).div(h // rh, rounding_mode="floor").unsqueeze(1)
    column = torch.arange(w, device=device).div(w // rw, rounding_mode="floor").unsqueeze(0)
    return torch.where((row < rh) & (column < rw), row * rw + column, -1).flatten()


def region_bridge_mask(
    num_prefix: int, grid: tuple[int, int], regions: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """Which query (row) attends to which key (column), bool [E, E]: what the structured kernels stand for."""
    N, M = grid[0] * grid[1], regions[0] * regions[1]
    owns = region_of_patch(grid, regions, device) == torch.arange(M, device=device).unsqueeze(1)  # [M, N]
    context = torch.ones(num_prefix + N, num_prefix + N, dtype=torch.bool, device=device)
    bridge = torch.cat([owns.new_zeros(M, num_prefix), owns], dim=1)  # [M, num_prefix + N]
    itself = torch.eye(M, dtype=torch.bool, device=device)
    return torch.cat([torch.cat([context, bridge.mT], dim=1), torch.cat([bridge, itself], dim=1)])


def _reference_with_lse(
    q: Tensor, k: Tensor, v: Tensor, num_prefix: int, grid: tuple[int, int], regions: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    scores = (q @ k.mT) * scale  # [B, heads, Eq, E]
    scores = scores.masked_fill(~_query_mask(q, k, num_prefix, grid, regions), float("-inf"))
    return scores.softmax(-1) @ v, scores.to(_accumulator(q.dtype)).logsumexp(-1)


def _query_mask(q: Tensor, k: Tensor, num_prefix: int, grid: tuple[int, int], regions: tuple[int, int]) -> Tensor:
    """The rows of the mask that q holds: any number of prefix queries, all alike."""
    return region_bridge_mask(num_prefix, grid, regions, q.device)[k.shape[2] - q.shape[2] :]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_prefix: int,
    grid: tuple[int, int],
    regions: tuple[int, int],
    scale: float | None = None,
    skip_prompts: bool = False,
) -> Tensor:
    """Dense attention under the [E, E] mask, every score stored: see `region_bridge_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _reference_with_lse(q, k, v, num_prefix, grid, regions, scale)[0]


def region_bridge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_prefix: int,
    grid: tuple[int, int],
    regions: tuple[int, int],
    scale: float | None = None,
    skip_prompts: bool = False,
) -> Tensor:
    """Self-attention over prefix, patch and region tokens in which a region token sees its own window and itself.

    out = softmax(scale * q k^T + mask) v,  with the mask of `region_bridge_mask`, which is never stored

    Args:
        q:            [B, heads, Eq, dh] queries; Eq = E, or Eq = 1 + h*w + rh*rw with skip_prompts. B = 0 gives an
                      empty result. Views of a packed projection are read where they lie.
        k, v:         [B, heads, E, dh]; E = num_prefix + h*w + rh*rw tokens in the order [prefix | patches | regions],
                      patches and regions row by row.
        num_prefix:   global token and prompts, at least 1. Their order does not matter: all are seen alike.
        grid:         (h, w) patches.
        regions:      (rh, rw) regions, rh <= h and rw <= w. Windows have floor(h / rh) x floor(w / rw) patches; the
                      margin left over sees no region and is seen by none.
        scale:        factor on the scores, dh ** -0.5 if None.
        skip_prompts: q holds one prefix row, the global token's: prompts are keys and values only (deep prompts are
                      replaced before the next layer, so what they attend to is never used).
    Returns:
        [B, heads, Eq, dh], lying in memory as [B, Eq, heads, dh] so that joining the heads is free. Differentiable in
        q, k and v, once.
    Source: CLIP-RC (CVPR 2024) section 3.2. The paper says nothing of patches seeing their region; its code does it.
    """
    _check(q, k, v, num_prefix, grid, regions, scale, skip_prompts)
    q, k, v = _matmul.autocast(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.zs3fast.region_bridge_attention(q, k, v, num_prefix, tuple(grid), tuple(regions), scale)[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_prefix: int,
    grid: tuple[int, int],
    regions: tuple[int, int],
    scale: float | None,
    skip_prompts: bool,
) -> None:
    for label, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{OP}: {label} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{OP}: {label} must be floating point, got {x.dtype}")
        if x.ndim != 4:
            raise ValueError(f"{OP}: {label} must be [B, heads, tokens, dh], got shape {list(x.shape)}")
        if x.dtype != q.dtype and not _matmul.autocasting(q):
            raise TypeError(f"{OP}: {label} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{OP}: {label} must be on q's device {q.device}, got {x.device}")
    if not _is_int(num_prefix):
        raise TypeError(f"{OP}: num_prefix must be an int, got {type(num_prefix).__name__}")
    if num_prefix < 1:
        raise ValueError(f"{OP}: num_prefix must be at least 1 (the global token), got {num_prefix}")
    for label, pair, letters in (("grid", grid, "(h, w)"), ("regions", regions, "(rh, rw)")):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(_is_int, pair)):
            raise TypeError(f"{OP}: {label} must be two ints {letters}, got {pair!r}")
        if pair[0] < 1 or pair[1] < 1:
            raise ValueError(f"{OP}: {label} {letters} must be at least (1, 1), got {tuple(pair)}")
    if regions[0] > grid[0] or regions[1] > grid[1]:
        raise ValueError(
            f"{OP}: regions {tuple(regions)} do not fit the grid {tuple(grid)}: every region needs a patch of its own"
        )
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"{OP}: scale must be a number or None, got {type(scale).__name__}")

    B, heads, _, dh = q.shape
    if heads < 1 or dh < 1:
        raise ValueError(f"{OP}: q must have at least one head of at least one column, got shape {list(q.shape)}")
    N, M = grid[0] * grid[1], regions[0] * regions[1]
    queries = (1 if skip_prompts else num_prefix) + N + M
    for label, x, prefix, rows in (
        ("q", q, "1 global" if skip_prompts else f"{num_prefix} prefix", queries),
        ("k", k, f"{num_prefix} prefix", num_prefix + N + M),
    ):
        if x.shape != (B, heads, rows, dh):
            raise ValueError(
                f"{OP}: {label} must be [{B}, {heads}, {rows}, {dh}], {rows} = {prefix} + {N} patches + {M} regions"
                f"{' (skip_prompts)' if skip_prompts and label == 'q' else ''}, got {list(x.shape)}"
            )
    if v.shape != k.shape:
        raise ValueError(f"{OP}: v must have k's shape {list(k.shape)}, got {list(v.shape)}")


def _is_int(n: object) -> bool:
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool)


# --- torch.library ---------------------------------------------------------------------------------------------------

_LAYOUT = "SymInt num_prefix, SymInt[2] grid, SymInt[2] regions, float scale"
for _namespace in ("zs3fast", "zs3fast_cpp"):
    torch.library.define(
        f"{_namespace}::region_bridge_attention",
        f"(Tensor q, Tensor k, Tensor v, {_LAYOUT}) -> (Tensor output, Tensor lse)",
    )
    torch.library.define(
        f"{_namespace}::region_bridge_attention_backward",
        f"(Tensor grad_output, Tensor q, Tensor k, Tensor v, Tensor output, Tensor lse, {_LAYOUT})"
        " -> (Tensor dq, Tensor dk, Tensor dv)",
    )
torch.library.define(
    "zs3fast_cpp::region_bridge_attention_wgmma",
    f"(Tensor q, Tensor k, Tensor v, {_LAYOUT}) -> (Tensor output, Tensor lse)",
)


@torch.library.impl("zs3fast::region_bridge_attention", "default")
def _run(*args):
    return _dispatch.call("region_bridge_attention", *args)


@torch.library.impl("zs3fast::region_bridge_attention_backward", "default")
def _run_backward(*args):
    return _dispatch.call("region_bridge_attention_backward", *args)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _empty_heads(x: Tensor) -> Tensor:
    """[B, heads, tokens, dh] lying in memory as [B, tokens, heads, dh]: joining the heads is a view."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


@torch.library.register_fake("zs3fast::region_bridge_attention")
def _fake(q, k, v, num_prefix, grid, regions, scale):
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=_accumulator(q.dtype))


@torch.library.register_fake("zs3fast::region_bridge_attention_backward")
def _fake_backward(grad_output, q, k, v, output, lse, num_prefix, grid, regions, scale):
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


def _setup_context(ctx, inputs, output):
    q, k, v, *ctx.layout = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad_output, _grad_lse):
    q, k, v, output, lse = ctx.saved_tensors
    grads = torch.ops.zs3fast.region_bridge_attention_backward(grad_output, q, k, v, output, lse, *ctx.layout)
    return (*grads, None, None, None, None)


torch.library.register_autograd("zs3fast::region_bridge_attention", _autograd, setup_context=_setup_context)


# --- backends --------------------------------------------------------------------------------------------------------


def _as_heads(x: Tensor) -> Tensor:
    return _empty_heads(x).copy_(x)


def _reference_run(*args):
    output, lse = _reference_with_lse(*args)
    return _as_heads(output), lse


def _reference_backward_run(grad_output, q, k, v, output, lse, num_prefix, grid, regions, scale):
    """dS = P (dP - sum P dP), with sum P dP = output . grad_output; half types accumulate in fp32."""
    dtype, mask = q.dtype, _query_mask(q, k, num_prefix, grid, regions)
    grad_output, q, k, v, output = (x.to(lse.dtype) for x in (grad_output, q, k, v, output))
    scores = ((q @ k.mT) * scale).masked_fill(~mask, float("-inf"))
    probabilities = (scores - lse.unsqueeze(-1)).exp()
    ds = probabilities * (grad_output @ v.mT - (output * grad_output).sum(-1, keepdim=True)) * scale
    return tuple(_as_heads(x.to(dtype)) for x in (ds @ k, ds.mT @ q, probabilities.mT @ grad_output))


def _cpp_run(*args):
    return torch.ops.zs3fast_cpp.region_bridge_attention(*args)


def _cpp_backward_run(*args):
    return torch.ops.zs3fast_cpp.region_bridge_attention_backward(*args)


def _triton_run(*args):
    from zs3fast.kernels import region_bridge_attention as kernels

    return kernels.forward(*args)


def _triton_backward_run(*args):
    from zs3fast.kernels import region_bridge_attention as kernels

    return kernels.backward(*args)


_CPP_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # half types are computed in fp32


def _cpp_objections(first: Tensor, *_args: object) -> list[str]:
    return _dispatch.cpp_objections(first, _CPP_DTYPES)


def _triton_objections(first: Tensor, *_args: object) -> list[str]:
    reasons = _matmul.triton_objections(first)
    return reasons + ([f"heads of width dh = {first.shape[-1]}, at most 128"] if first.shape[-1] > 128 else [])


# forward alone: its log-sum-exp is what the other backends' backward passes need
def _cuda_objections(q: Tensor, *args: object) -> list[str]:
    return _mma.objections(OP, q, *args[:2])  # k, v


def _wgmma_objections(q: Tensor, k: Tensor, v: Tensor, *_args: object) -> list[str]:
    return _mma.wgmma_objections(OP, k, v, q)


_dispatch.register("region_bridge_attention", "reference", _reference_run, _dispatch.never)
_dispatch.register("region_bridge_attention", "cpp", _cpp_run, _cpp_objections)
_dispatch.register("region_bridge_attention", "triton", _triton_run, _triton_objections)
_dispatch.register("region_bridge_attention", "cuda", partial(_mma.run, OP), _cuda_objections)
_dispatch.register("region_bridge_attention", "cuda:wgmma", partial(_mma.run_wgmma, OP), _wgmma_objections)
_dispatch.register("region_bridge_attention_backward", "reference", _reference_backward_run, _dispatch.never)
_dispatch.register("region_bridge_attention_backward", "cpp", _cpp_backward_run, _cpp_objections)
_dispatch.register("region_bridge_attention_backward", "triton", _triton_backward_run, _triton_objections)
