"""relationship_descriptor: class queries from text and image (ZegCLIP section 3.3; TagCLIP eqs. 2, 7; CLIP-RC eq. 5).

    out[b, c] = W [text[c] * visual[b], text[c]] + bias = W1 (text[c] * visual[b]) + (W2 text[c] + bias)

The bracket does not depend on the image: `text_term` computes it once per class list. With it the op is one matrix
product of [B * (M) * C, D] by [D, D'], and the 2D-wide concatenation is never stored.

Floor, with R = B (M) visual rows and the text term given: 2 R C D D' FLOPs (twice that for the eager structure), and
(C + R + D') D + C D' elements read, R C D' written. At R = 1, C = 171, D = D' = 512 that is 90 MFLOP over 2 MB in
fp32. The backward pass is two such products: H = grad W1, summed against visual and text, and W1's gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.ops import _dispatch, _matmul
from zs3fast.ops._checks import check_float_tensor
from zs3fast.ops._flops import Shape
from zs3fast.ops._register import Backward, register_op

OP = "relationship_descriptor"


def reference(
    text: Tensor, visual: Tensor, weight: Tensor, bias: Tensor | None = None, text_term: Tensor | None = None
) -> Tensor:
    """Relationship descriptor of every class with every visual token: Linear(concat(text * visual, text)).

    Args:
        text:      [C, D] class embeddings. C = 0 gives an empty result.
        visual:    [B, D] global tokens, or [B, M, D] region tokens.
        weight:    [D', 2D].  bias: [D'] or None.
        text_term: [C, D'] what stands in for the text's half, bias included; None computes it.
    Returns:
        [B, C, D'] or [B, M, C, D'].
    """
    t = text.expand(*visual.shape[:-1], *text.shape)  # [B, (M,) C, D]
    if text_term is not None:
        return F.linear(t * visual.unsqueeze(-2), weight[:, : text.shape[1]]) + text_term
    pair = torch.cat([t * visual.unsqueeze(-2), t], dim=-1)  # [B, (M,) C, 2D]
    return F.linear(pair, weight, bias)


def text_term(text: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The half of the descriptor that no image changes: text @ W2.T + bias.

    Args:
        text: [C, D].  weight: [D', 2D], W2 its right half.  bias: [D'] or None.
    Returns:
        [C, D'], for the `text_term` of `relationship_descriptor`. Differentiable.
    """
    _check_text("text_term", text, weight, bias)
    return F.linear(text, weight[:, text.shape[1] :], bias)


def relationship_descriptor(
    text: Tensor, visual: Tensor, weight: Tensor, bias: Tensor | None = None, text_term: Tensor | None = None
) -> Tensor:
    """Relationship descriptor of every class with every visual token: Linear(concat(text * visual, text)).

    out[b, (m,) c] = W1 (text[c] * visual[b, (m)]) + text_term[c],    weight = [W1, W2]

    Args:
        text:      [C, D] class embeddings. C = 0 gives an empty result, B = 0 and M = 0 too.
        visual:    [B, D] global tokens, or [B, M, D] region tokens.
        weight:    [D', 2D].  bias: [D'] or None.
        text_term: [C, D'], `text_term(text, weight, bias)` if the caller kept it: then W2 and bias are not used again,
                   and their gradients flow through it. None computes it.
    Returns:
        [B, C, D'] or [B, M, C, D'], contiguous. Differentiable in every tensor, once. NaN stands where torch's product
        has it.
    Source: ZegCLIP (CVPR 2023) section 3.3; CLIP-RC eq. 5 with region tokens.
    """
    _check_text(OP, text, weight, bias)
    _check_tensor(OP, "visual", visual, text)
    D = text.shape[1]
    if visual.ndim not in (2, 3) or visual.shape[-1] != D:
        raise ValueError(f"{OP}: visual: expected [B, D] or [B, M, D] with text's D = {D}, got {list(visual.shape)}")
    if text_term is not None:
        _check_tensor(OP, "text_term", text_term, text)
        if text_term.shape != (text.shape[0], weight.shape[0]):
            expected = [text.shape[0], weight.shape[0]]
            raise ValueError(f"{OP}: text_term: expected [C, D'] = {expected}, got {list(text_term.shape)}")
    tensors = _matmul.autocast(text, visual, weight, bias, text_term)
    descriptor: Tensor = torch.ops.zs3fast.relationship_descriptor(*tensors)
    return descriptor


def _check_tensor(name: str, label: str, x: Tensor, text: Tensor) -> None:
    check_float_tensor(name, label, x)
    if x.device != text.device:
        raise ValueError(f"{name}: {label}: expected text's device {text.device}, got {x.device}")
    if x.dtype != text.dtype and not _matmul.autocasting(text):
        raise TypeError(f"{name}: {label}: expected text's dtype {text.dtype}, got {x.dtype}")


def _check_text(name: str, text: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_tensor(name, "text", text, text)
    if text.ndim != 2 or text.shape[1] < 1:
        raise ValueError(f"{name}: text: expected [C, D >= 1], got shape {list(text.shape)}")
    _check_tensor(name, "weight", weight, text)
    D = text.shape[1]
    if weight.ndim != 2 or weight.shape[1] != 2 * D:
        raise ValueError(f"{name}: weight: expected [D', 2D] = [D', {2 * D}], got shape {list(weight.shape)}")
    if bias is not None:
        _check_tensor(name, "bias", bias, text)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: bias: expected [D'] = [{weight.shape[0]}], got shape {list(bias.shape)}")


# --- registration ----------------------------------------------------------------------------------------------------


def _fake(
    text: Tensor, visual: Tensor, weight: Tensor, bias: Tensor | None = None, text_term: Tensor | None = None
) -> Tensor:
    return visual.new_empty(*visual.shape[:-1], text.shape[0], weight.shape[0])


def _fake_backward(
    grad: Tensor,
    text: Tensor,
    visual: Tensor,
    weight: Tensor,
    has_text_term: bool,
    need_text: bool,
    need_visual: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    return (
        text.new_empty(text.shape if need_text else 0),
        visual.new_empty(visual.shape if need_visual else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        text.new_empty(text.shape[0], weight.shape[0]),
    )


def _reference_run(*args: Any) -> Tensor:
    return reference(*args).contiguous()


def _reference_backward_run(
    grad: Tensor,
    text: Tensor,
    visual: Tensor,
    weight: Tensor,
    has_text_term: bool,
    need_text: bool,
    need_visual: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    """H = grad W1; dtext = sum_r H_r visual_r, dvisual_r = sum_c H_rc text_c, dterm = sum_r grad_r."""
    dtype = torch.promote_types(text.dtype, torch.float32)
    C, D = text.shape
    R = visual.numel() // D
    g = grad.to(dtype).reshape(R, C, weight.shape[0])  # [R, C, D']
    t, v, w = text.to(dtype), visual.to(dtype).reshape(R, 1, D), weight.to(dtype)
    dterm = g.sum(0)
    dtext, dvisual, dweight = (text.new_empty(0) for _ in range(3))
    if need_text or need_visual:
        hadamard = g @ w[:, :D]  # gradient of text * visual, [R, C, D]
    if need_text:
        dtext = (hadamard * v).sum(0)
        if not has_text_term:
            dtext = dtext + dterm @ w[:, D:]
    if need_visual:
        dvisual = (hadamard * t).sum(1).reshape(visual.shape)
    if need_weight:
        left = g.flatten(0, 1).T @ (t * v).flatten(0, 1)
        right = torch.zeros_like(left) if has_text_term else dterm.T @ t
        dweight = torch.cat([left, right], dim=1)
    return tuple(x.to(text.dtype) for x in (dtext, dvisual, dweight, dterm))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    text, visual, weight, bias, term = inputs
    ctx.has_text_term = term is not None
    ctx.save_for_backward(text, visual, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    text, visual, weight = ctx.saved_tensors
    # the dispatcher leaves out trailing arguments that are their default
    for_text, for_visual, for_weight, for_bias, for_term = (*ctx.needs_input_grad, False, False)[:5]
    dtext, dvisual, dweight, dterm = torch.ops.zs3fast.relationship_descriptor_backward(
        grad, text, visual, weight, ctx.has_text_term, for_text, for_visual, for_weight
    )
    return (
        dtext if for_text else None,
        dvisual if for_visual else None,
        dweight if for_weight else None,
        dterm.sum(0) if for_bias and not ctx.has_text_term else None,
        dterm if for_term else None,
    )


def _cpp_objections(first: Tensor, *_args: object) -> list[str]:
    return _dispatch.cpp_objections(first)


def _triton_objections(first: Tensor, *_args: object) -> list[str]:
    return _matmul.triton_objections(first)


def _count(text: Shape, visual: Shape, weight: Shape, _bias: Shape | None = None, term: Shape | None = None) -> int:
    """The image's half for every token, the text's once."""
    C, D = text
    rows = math.prod(visual[:-1])
    return 2 * D * weight[0] * C * (rows + (term is None))


def _count_backward(
    _grad: Shape, text: Shape, visual: Shape, weight: Shape, has_term: bool, for_text: bool, for_visual: bool,
    for_weight: bool,
) -> int:  # fmt: skip
    C, D = text
    rows = math.prod(visual[:-1])
    of_image = rows * ((for_text or for_visual) + for_weight)
    of_text = 0 if has_term else for_text + for_weight
    return 2 * D * weight[0] * C * (of_image + of_text)


register_op(
    OP,
    schema="(Tensor text, Tensor visual, Tensor weight, Tensor? bias=None, Tensor? text_term=None) -> Tensor",
    fake=_fake,
    reference=_reference_run,
    flops=_count,
    backends={"cpp": _cpp_objections, "triton": _triton_objections},
    backward=Backward(
        # what is not needed comes back as an empty tensor; dterm is the gradient of the text term, bias's is its sum
        schema=(
            "(Tensor grad, Tensor text, Tensor visual, Tensor weight, bool has_text_term,"
            " bool need_text, bool need_visual, bool need_weight)"
            " -> (Tensor dtext, Tensor dvisual, Tensor dweight, Tensor dterm)"
        ),
        fake=_fake_backward,
        reference=_reference_backward_run,
        flops=_count_backward,
        backends={"cpp": _cpp_objections, "triton": _triton_objections},
        setup_context=_setup_context,
        gradients=_gradients,
    ),
)
