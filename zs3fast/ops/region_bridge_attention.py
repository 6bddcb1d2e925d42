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

On the CPU step 1 is `encoder_attention`'s kernel, with and without gradients: float32 by AVX-512, AVX2 or what every
x86 has, bfloat16 by AMX's tiles, `vdpbf16ps`, or widened. Steps 2 and 3 are loops over a region's rows, read in their
own type and summed in float32. Step 1's backward is torch's own, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zs3fast.ops import _flops, _matmul
from zs3fast.ops._attention import (
    accumulator,
    as_heads,
    check_heads,
    cpp_objections,
    empty_heads,
    empty_lse,
    masked_product,
    triton_objections,
)
from zs3fast.ops._checks import check_bool, check_number, check_size, is_int
from zs3fast.ops._register import Backward, register_op

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
    mask = _query_mask(q, k, num_prefix, grid, regions)
    scores = scores.masked_fill(~mask, float("-inf"))
    return masked_product(scores.softmax(-1), mask, v), scores.to(accumulator(q.dtype)).logsumexp(-1)


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
        q, k and v, once. A NaN reaches at least the rows that see it, from a value in its column alone, and no other
        head; on the CPU it reaches nobody else.
    Source: CLIP-RC (CVPR 2024) section 3.2. The paper says nothing of patches seeing their region; its code does it.
    """
    _check(q, k, v, num_prefix, grid, regions, scale, skip_prompts)
    q, k, v = _matmul.autocast(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    output: Tensor
    output, _ = torch.ops.zs3fast.region_bridge_attention(q, k, v, num_prefix, tuple(grid), tuple(regions), scale)
    return output


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
    check_heads(OP, q, k=k, v=v)
    if not is_int(num_prefix):
        raise TypeError(f"{OP}: num_prefix: expected an int, got {type(num_prefix).__name__}")
    if num_prefix < 1:
        raise ValueError(f"{OP}: num_prefix: expected at least 1 (the global token), got {num_prefix}")
    check_size(OP, "grid", grid)
    check_size(OP, "regions", regions)
    if regions[0] > grid[0] or regions[1] > grid[1]:
        raise ValueError(f"{OP}: regions: expected at most one a patch of the grid {tuple(grid)}, got {tuple(regions)}")
    check_number(OP, "scale", scale, optional=True)
    check_bool(OP, "skip_prompts", skip_prompts)

    B, heads, _, dh = q.shape
    N, M = grid[0] * grid[1], regions[0] * regions[1]
    for label, x, global_only in (("q", q, skip_prompts), ("k", k, False)):
        rows = (1 if global_only else num_prefix) + N + M
        if x.shape != (B, heads, rows, dh):
            prefix = "1 global" if global_only else f"{num_prefix} prefix"  # here: a graph of any size takes no text
            raise ValueError(
                f"{OP}: {label}: expected [{B}, {heads}, {rows}, {dh}], {rows} = {prefix} + {N} patches + {M} regions"
                f"{' (skip_prompts)' if global_only else ''}, got {list(x.shape)}"
            )
    if v.shape != k.shape:
        raise ValueError(f"{OP}: v: expected k's shape {list(k.shape)}, got {list(v.shape)}")


# --- registration ----------------------------------------------------------------------------------------------------

Pair = tuple[int, int]


def _fake(
    q: Tensor, k: Tensor, v: Tensor, num_prefix: int, grid: Pair, regions: Pair, scale: float
) -> tuple[Tensor, Tensor]:
    return empty_heads(q), empty_lse(q)


def _fake_backward(grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, *_args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(q), empty_heads(k), empty_heads(v)


def _reference_run(
    q: Tensor, k: Tensor, v: Tensor, num_prefix: int, grid: Pair, regions: Pair, scale: float
) -> tuple[Tensor, Tensor]:
    output, lse = _reference_with_lse(q, k, v, num_prefix, grid, regions, scale)
    return as_heads(output), lse


def _reference_backward_run(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    num_prefix: int,
    grid: Pair,
    regions: Pair,
    scale: float,
) -> tuple[Tensor, ...]:
    """dS = P (dP - sum P dP), with sum P dP = output . grad_output; half types accumulate in fp32."""
    dtype, mask = q.dtype, _query_mask(q, k, num_prefix, grid, regions)
    grad_output, q, k, v, output = (x.to(lse.dtype) for x in (grad_output, q, k, v, output))
    scores = ((q @ k.mT) * scale).masked_fill(~mask, float("-inf"))
    probabilities = (scores - lse.unsqueeze(-1)).exp()
    ds = probabilities * (grad_output @ v.mT - (output * grad_output).sum(-1, keepdim=True)) * scale
    return tuple(as_heads(x.to(dtype)) for x in (ds @ k, ds.mT @ q, probabilities.mT @ grad_output))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *ctx.layout = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_output: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, output, lse = ctx.saved_tensors
    grads = torch.ops.zs3fast.region_bridge_attention_backward(grad_output, q, k, v, output, lse, *ctx.layout)
    return (*grads, None, None, None, None)


def _flops_of(products: int, q: _flops.Shape, num_prefix: int, grid: Pair, regions: Pair) -> int:
    """The pairs under the mask, not the E x E: what steps 1 to 3 above multiply."""
    B, heads, queries, dh = q
    N, M = grid[0] * grid[1], regions[0] * regions[1]
    in_windows = M * (grid[0] // regions[0]) * (grid[1] // regions[1])
    pairs = (queries - M) * (num_prefix + N) + 2 * in_windows + M
    return _flops.attention(1, pairs, B * heads, dh, products)


_LAYOUT = "SymInt num_prefix, SymInt[2] grid, SymInt[2] regions, float scale"
torch.library.define(  # by a kernel of encoder_attention's, for tests
    f"zs3fast_cpp::{OP}_by", f"(Tensor q, Tensor k, Tensor v, {_LAYOUT}, str kernel) -> (Tensor output, Tensor lse)"
)
register_op(
    OP,
    schema=f"(Tensor q, Tensor k, Tensor v, {_LAYOUT}) -> (Tensor output, Tensor lse)",
    fake=_fake,
    reference=_reference_run,
    flops=lambda q, _k, _v, *layout: _flops_of(2, q, *layout[:3]),
    backends={"cpp": cpp_objections, "triton": triton_objections},
    backward=Backward(
        schema=(
            f"(Tensor grad_output, Tensor q, Tensor k, Tensor v, Tensor output, Tensor lse, {_LAYOUT})"
            " -> (Tensor dq, Tensor dk, Tensor dv)"
        ),
        fake=_fake_backward,
        reference=_reference_backward_run,
        flops=lambda _grad, q, _k, _v, _output, _lse, *layout: _flops_of(5, q, *layout[:3]),
        backends={"cpp": cpp_objections, "triton": triton_objections},
        setup_context=_setup_context,
        gradients=_gradients,
    ),
)
