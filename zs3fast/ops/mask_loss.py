"""mask_loss: sigmoid focal and dice loss of upsampled mask logits, from the patch grid alone (ZegCLIP section 3.4).

With z = bilinear upsampling of mask_logits[b, c] to H x W, t = 1 where labels[b] == c (0 on every other pixel, ignored
ones included), p = sigmoid(z) and s = z where t = 0, -z where t = 1:

    focal = 1/n sum_{b,c} mean_{H W} (t ? alpha : 1 - alpha) sigmoid(s)^gamma softplus(s)
    dice  = 1/n sum_{(b,c) present} 1 - (2 sum p t + 1) / (sum p + sum t + 1)
    n     = max(1, number of (image, present class) pairs, averaged over the workers of torch.distributed)

The op `zs3fast::mask_loss` returns the four sums over pixels as [B, C]; the rest is plain torch on [B, C]. Its backward
is dz = grad_focal df/dz + (grad_prob + t grad_intersection) p (1 - p), gathered by the transpose of the upsampling:

    df/ds = (t ? alpha : 1 - alpha) sigmoid(s)^gamma (gamma sigmoid(-s) softplus(s) + sigmoid(s)),   dz = t ? -ds : ds

Floor: an exponential, a logarithm, a division and about 20 other FLOPs for each of the B C H W pixels, forward and
backward again. In memory only mask_logits, labels and the gradient: at B = 4, C = 156, 32 x 32 -> 512 x 512 with int64
labels 2.6 + 8.4 + 2.6 MB, where one full-size tensor is 654 MB and the eager structure keeps eight for focal alone.
Arithmetic bounds it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from zs3fast.ops import _dispatch, _flops
from zs3fast.ops._checks import check_float_tensor, check_strided
from zs3fast.ops._register import Backward, register_op
from zs3fast.utils.waiting import check

OP = "mask_loss"

_LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class MaskLossTerms(NamedTuple):
    """Unweighted loss terms, scalars already divided by `num_masks`, the number of masks a worker saw on average."""

    focal: Tensor
    dice: Tensor
    num_masks: Tensor


def reference(
    mask_logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums over pixels that focal and dice loss are made of.

    Half types are computed in float32. Any label outside 0..C-1 makes its pixel a negative of every class.

    Args:
        mask_logits: [B, C, h, w] pre-sigmoid, of any float type.
        labels:      [B, H, W] channel indices.
    Returns:
        focal_sum, intersection, prob_sum, target_count: each [B, C], float32 (float64 for float64 logits).
    """
    z, target = _upsample(mask_logits, labels)
    s = torch.where(target, -z, z)
    wrong = (gamma * F.logsigmoid(s)).exp()  # sigmoid(s) ** gamma, with a finite gradient for every gamma
    focal = torch.where(target, alpha, 1 - alpha) * wrong * -F.logsigmoid(-s)  # softplus(s), exact for large s
    prob = z.sigmoid()
    return (
        focal.sum((2, 3)),
        torch.where(target, prob, 0).sum((2, 3)),
        prob.sum((2, 3)),
        target.sum((2, 3)).to(z.dtype),
    )


def reference_backward(
    grad_focal_sum: Tensor,
    grad_intersection: Tensor,
    grad_prob_sum: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Gradient of `reference` by its formula: dz at full size, then the transpose of the upsampling; [B, C, h, w]."""
    z, target = _upsample(mask_logits, labels)
    s = torch.where(target, -z, z)
    slope = (gamma * F.logsigmoid(s)).exp() * (s.sigmoid() - gamma * (-s).sigmoid() * F.logsigmoid(-s))
    of_focal, of_intersection, of_prob = (
        g[:, :, None, None] for g in (grad_focal_sum, grad_intersection, grad_prob_sum)
    )
    dz = of_focal * torch.where(target, -alpha, 1 - alpha) * slope
    dz = dz + (of_prob + torch.where(target, of_intersection, 0)) * z.sigmoid() * (-z).sigmoid()
    grad = torch.ops.aten.upsample_bilinear2d_backward(dz, list(labels.shape[1:]), list(mask_logits.shape), False)
    contiguous: Tensor = grad.to(mask_logits.dtype, memory_format=torch.contiguous_format)
    return contiguous


def _upsample(mask_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets [B, C, H, W]."""
    wide = mask_logits.to(torch.promote_types(mask_logits.dtype, torch.float32))
    z = F.interpolate(wide, size=labels.shape[1:], mode="bilinear", align_corners=False)
    channels = torch.arange(mask_logits.shape[1], device=labels.device)
    return z, labels.unsqueeze(1) == channels[:, None, None]


def mask_loss(
    mask_logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    alpha: float = 0.25,
    gamma: float = 2.0,
    num_masks: Tensor | float | None = None,
    validate: bool = True,
) -> MaskLossTerms:
    """Sigmoid focal and dice loss of mask logits upsampled bilinearly (align_corners=False) to the size of the labels.

        focal = 1/n sum_{b,c} mean_pixels (t ? alpha : 1 - alpha) sigmoid(s)^gamma softplus(s),  s = t ? -z : z
        dice  = 1/n sum_{(b,c) present} 1 - (2 sum p t + 1) / (sum p + sum t + 1)

    No tensor of size [B, C, H, W] is made, forward or backward. Ignored pixels are not left out: as in the published
    training they are negatives of every class, in both terms. An image without a valid label adds nothing to dice;
    B = 0 gives zeros. A NaN logit makes the sums of its image and class NaN, and the loss; infinities are not promised.

    Args:
        mask_logits:  [B, C, h, w] pre-sigmoid, C >= 1. Half types are computed in float32.
        labels:       [B, H, W] integer channel indices 0..C-1, or `ignore_index`.
        ignore_index: an integer outside 0..C-1.
        alpha, gamma: weight of the positives, 0..1, and focusing exponent, >= 0.
        num_masks:    the normaliser n; None: max(1, number of (image, present class) pairs), the number averaged over
                      the workers (one all_reduce) where torch.distributed is initialised.
        validate:     look at the label values, on a GPU without waiting for it (`zs3fast.utils.waiting`); never done
                      while a graph is traced. An invalid label that is not looked for is treated as ignored.
    Returns:
        MaskLossTerms(focal, dice, num_masks): scalars, float32 (float64 for float64 logits), unweighted.
    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or option; a label that is neither channel nor ignored, with
            its place.

    ZegCLIP (CVPR 2023), section 3.4; Lin et al., Focal Loss (ICCV 2017); Milletari et al., V-Net (2016).
    """
    _check(mask_logits, labels, ignore_index, alpha, gamma, num_masks)
    if validate and not torch.compiler.is_compiling():
        _check_labels(labels, mask_logits.shape[1], ignore_index)
    sums = torch.ops.zs3fast.mask_loss(mask_logits, labels, alpha, gamma)
    focal_sum, intersection, prob_sum, target_count = sums
    present = target_count > 0
    if num_masks is None:
        n = _average_masks(present, target_count.dtype)
    elif isinstance(num_masks, Tensor):
        n = num_masks.to(target_count).reshape(())
    else:
        n = target_count.new_full((), num_masks)  # filled in there: a copy would wait for the device
    overlap = (2 * intersection + 1) / (prob_sum + target_count + 1)
    return MaskLossTerms(
        focal=focal_sum.sum() / (labels.shape[1] * labels.shape[2]) / n,
        dice=torch.where(present, 1 - overlap, 0).sum() / n,
        num_masks=n,
    )


def _average_masks(present: Tensor, dtype: torch.dtype) -> Tensor:
    count = present.sum().to(dtype)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp_min(1)


def _check(
    mask_logits: Tensor, labels: Tensor, ignore_index: int, alpha: float, gamma: float, num_masks: Tensor | float | None
) -> None:
    check_float_tensor(OP, "mask_logits", mask_logits)
    if not isinstance(labels, Tensor):
        raise TypeError(f"{OP}: labels: expected a tensor, got {type(labels).__name__}")
    check_strided(OP, "labels", labels)
    if labels.dtype not in _LABEL_DTYPES:
        expected = ", ".join(str(d)[6:] for d in _LABEL_DTYPES)
        raise TypeError(f"{OP}: labels: expected integers ({expected}), got {labels.dtype}")
    if mask_logits.dim() != 4 or 0 in mask_logits.shape[1:]:
        raise ValueError(f"{OP}: mask_logits: expected [B, C, h, w] with C, h, w >= 1, got {list(mask_logits.shape)}")
    if labels.dim() != 3 or 0 in labels.shape[1:]:
        raise ValueError(f"{OP}: labels: expected [B, H, W] with H, W >= 1, got {list(labels.shape)}")
    B, C = mask_logits.shape[:2]
    if labels.shape[0] != B:
        raise ValueError(f"{OP}: labels: expected as many images as mask_logits, B = {B}, got {labels.shape[0]}")
    if labels.device != mask_logits.device:
        raise ValueError(f"{OP}: labels: expected the device of mask_logits {mask_logits.device}, got {labels.device}")
    if 0 <= ignore_index < C:
        raise ValueError(f"{OP}: ignore_index: expected a value outside the classes 0..{C - 1}, got {ignore_index}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"{OP}: alpha: expected a number in 0..1, got {alpha}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"{OP}: gamma: expected a finite number >= 0, got {gamma}")
    if isinstance(num_masks, Tensor):
        if num_masks.numel() != 1:
            raise ValueError(f"{OP}: num_masks: expected a number or one element, got {list(num_masks.shape)}")
    elif num_masks is not None and not num_masks > 0:
        raise ValueError(f"{OP}: num_masks: expected a positive number, got {num_masks}")


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    values = labels.long()  # in a narrow type 255 == -1 and 300 is 44
    wrong = ((values < 0) | (values >= classes)) & (values != ignore_index)

    def error(place: list[int], value: int) -> ValueError:
        expected = f"channels 0..{classes - 1} or ignore_index = {ignore_index}"
        return ValueError(f"{OP}: labels: expected {expected}, got {value} at (b, y, x) = {tuple(place)}")

    check(wrong, labels, error)


# --- registration ----------------------------------------------------------------------------------------------------


def _fake(mask_logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(mask_logits.dtype, torch.float32)
    return tuple(mask_logits.new_empty(mask_logits.shape[:2], dtype=dtype) for _ in range(4))


def _fake_backward(
    grad_focal_sum: Tensor, grad_intersection: Tensor, grad_prob_sum: Tensor, mask_logits: Tensor, *_args: Any
) -> Tensor:
    return mask_logits.new_empty(mask_logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mask_logits, labels, ctx.alpha, ctx.gamma = inputs
    ctx.save_for_backward(mask_logits, labels)
    ctx.mark_non_differentiable(output[3])


def _gradients(
    ctx: Any, grad_focal_sum: Tensor, grad_intersection: Tensor, grad_prob_sum: Tensor, _grad_target_count: Tensor
) -> tuple[Tensor | None, ...]:
    mask_logits, labels = ctx.saved_tensors
    grad = torch.ops.zs3fast.mask_loss_backward(
        grad_focal_sum, grad_intersection, grad_prob_sum, mask_logits, labels, ctx.alpha, ctx.gamma
    )
    return grad, None, None, None


_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # half types are computed in fp32


def _cpp_objections(mask_logits: Tensor, *_args: object) -> list[str]:
    return _dispatch.cpp_objections(mask_logits, _KERNEL_DTYPES)


def _triton_objections(mask_logits: Tensor, *_args: object) -> list[str]:
    return _dispatch.triton_objections(mask_logits)


def _of_logits(objections: _dispatch.Objections) -> _dispatch.Objections:
    """The same of the backward pass, whose first arguments are three gradients."""
    return lambda *args: objections(*args[3:])


def _interpolation(logits: _flops.Shape, labels: _flops.Shape) -> int:
    return _flops.PER_INTERPOLATED * logits[0] * logits[1] * labels[1] * labels[2]


register_op(
    OP,
    schema=(
        "(Tensor mask_logits, Tensor labels, float alpha, float gamma)"
        " -> (Tensor focal_sum, Tensor intersection, Tensor prob_sum, Tensor target_count)"
    ),
    fake=_fake,
    reference=reference,
    flops=lambda logits, labels, *_: _interpolation(logits, labels),
    backends={"cpp": _cpp_objections, "triton": _triton_objections},
    backward=Backward(
        schema=(
            "(Tensor grad_focal_sum, Tensor grad_intersection, Tensor grad_prob_sum, Tensor mask_logits,"
            " Tensor labels, float alpha, float gamma) -> Tensor"
        ),
        fake=_fake_backward,
        reference=reference_backward,
        flops=lambda _focal, _overlap, _prob, logits, labels, *_: 2 * _interpolation(logits, labels),  # and transposed
        backends={
            "cpp": _of_logits(_cpp_objections),
            "triton": _of_logits(_triton_objections),
        },
        setup_context=_setup_context,
        gradients=_gradients,
    ),
)
