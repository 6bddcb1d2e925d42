"""Every op in every way of calling it that matters on a GPU, at sizes from tiny to published, from tests/ops.

problem = FAMILIES["mask_loss"].make(shape, torch.bfloat16)
with use_backend("triton"):
    problem.check_forward()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.device import DEVICE, ON_GPU
from tests.ops import test_add_layer_norm as adding
from tests.ops import test_attention_to_mask as attention
from tests.ops import test_mask_loss as loss
from tests.ops import test_masks_to_bits as bits
from tests.ops import test_masks_to_labels as labels
from tests.ops import test_proposal_attention as proposals
from tests.ops import test_proposals_to_labels as fusion
from tests.ops import test_region_bridge_attention as bridge
from tests.ops import test_relationship_descriptor as descriptor
from tests.ops.budget import assert_within_budget
from zs3fast.ops import (
    _dispatch,
    add_layer_norm,
    attention_to_mask,
    masks_to_bits,
    masks_to_labels,
    proposal_attention,
    proposals_to_labels,
    relationship_descriptor,
)
from zs3fast.ops import region_bridge_attention as region_bridge


@dataclass(frozen=True)
class Problem:
    """One request to an op.

    tensors: its floating-point inputs, all of which have gradients if the op is differentiable.
    call:    the op as a function of `tensors`.
    definition: what `call` should give, within the error budget of tests/ops; or else
    judge:   calls the op on tensors and raises AssertionError if labels or bits are wrong.
    rest:    arguments of torch.ops.zs3fast.<op> behind the tensors, where a backend's objections look at them.
    roundings: of half types that gradients may have beyond twice what plain torch errs.
    """

    op: str
    tensors: tuple[Tensor, ...]
    call: Callable[..., Any]
    definition: Callable[..., Any] | None = None
    judge: Callable[..., object] | None = None
    rest: tuple[Any, ...] = ()
    roundings: int = 1

    def check_forward(self, *tensors: Tensor) -> None:
        """The result on `tensors` (these values, lying in memory in another way), or on the problem's own."""
        tensors = tensors or self.tensors
        if self.judge is not None:
            self.judge(*tensors)
        else:
            assert_within_budget(self.op, self.call(*tensors), self.definition, *tensors)

    def check_backward(self, *tensors: Tensor) -> None:
        """The gradients of all tensors, for a random gradient of every result."""
        tensors = tensors or self.tensors
        with torch.no_grad():
            results = as_tuple(self.call(*tensors))
        torch.manual_seed(1)
        grads = [torch.randn_like(result) for result in results]
        got = self.gradients(self.call, *grads, *tensors)
        expected = partial(self.gradients, self.definition)
        assert_within_budget(f"d{self.op}", got, expected, *grads, *tensors, roundings=self.roundings)

    def gradients(self, function: Callable[..., Any], *grads_and_tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(grads_and_tensors) - len(self.tensors)
        leaves = [x.detach().requires_grad_() for x in grads_and_tensors[count:]]
        pairs = zip(as_tuple(function(*leaves)), grads_and_tensors[:count], strict=True)
        pairs = [(result, grad.to(result.dtype)) for result, grad in pairs if result.requires_grad]
        return torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs])


@dataclass(frozen=True)
class Family:
    """One way of calling an op: how to make a problem of a shape, and the shapes by name."""

    op: str
    make: Callable[..., Problem]
    shapes: Mapping[str, Any]
    products: bool = False  # multiplies matrices, so that tf32 makes a difference
    differentiable: bool = True


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def moved(tensors: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.to(DEVICE, dtype) for x in tensors)


# One function a family -----------------------------------------------------------------------------------------------


def make_attention_to_mask(shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Problem:
    tensors = moved(attention._inputs(shape), dtype)
    scale = shape[-1] ** -0.5
    call, definition = (
        partial(lambda f, q, k, v: f(q, k, v, scale, **options), f) for f in (attention_to_mask, attention.reference)
    )
    return Problem("attention_to_mask", tensors, call, definition, roundings=2)


def make_add_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    def steps(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return residual + x, F.layer_norm(residual + x, weight.shape, weight, bias)

    return Problem("add_layer_norm", moved(adding.make(shape), dtype), add_layer_norm, steps)


def make_relationship_descriptor(shape: tuple[Any, ...], dtype: torch.dtype, cached: bool) -> Problem:
    tensors = moved(descriptor._inputs(shape), dtype)
    call = descriptor._cached if cached else relationship_descriptor
    return Problem("relationship_descriptor", tensors, call, descriptor.reference, roundings=2)


def make_mask_loss(shape: tuple[int, ...], dtype: torch.dtype, gamma: float) -> Problem:
    logits, targets, _ = loss.make(shape, dtype, DEVICE)
    call, definition = (
        partial(lambda f, logits: f(logits, targets, 0.25, gamma), f) for f in (loss.op, loss.reference)
    )
    return Problem("mask_loss", (logits,), call, definition)


def make_proposal_attention(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Problem:
    tensors, _, masks = proposals.make(shape, kind, dtype, DEVICE)
    call, definition = (partial(lambda f, *x: f(*x, masks), f) for f in (proposal_attention, proposals.reference))
    return Problem("proposal_attention", tensors, call, definition)


def make_region_bridge_attention(shape: tuple[Any, ...], dtype: torch.dtype, skip: bool) -> Problem:
    tensors, _, layout = bridge.make(shape, dtype, DEVICE, skip=skip)
    call, definition = (partial(f, **layout) for f in (region_bridge, bridge.reference))
    return Problem("region_bridge_attention", tensors, call, definition)


def make_masks_to_bits(case: tuple[Any, ...], dtype: torch.dtype) -> Problem:
    _, _, _, padded, grid = case
    options = {"padded_size": padded, "align_corners": True, "logits": True}

    def judge(logits: Tensor) -> None:
        soft = logits.float().new_zeros(*logits.shape[:2], *padded)
        if logits.numel() > 0:
            soft = F.interpolate(logits.float(), size=padded, mode="bilinear", align_corners=True).sigmoid()
        bits.check(masks_to_bits(logits, grid, **options), bits.soft_at_grid(soft, grid))

    tensors = (bits.make(case, DEVICE, dtype),)
    return Problem("masks_to_bits", tensors, lambda logits: masks_to_bits(logits, grid, **options), judge=judge)


def make_masks_to_labels(shape: tuple[Any, ...], dtype: torch.dtype, windows: bool) -> Problem:
    """Calibrated, with a trusty map; `windows`: two of them, overlapping, an image."""
    batch, classes, h, w, (height, width) = shape
    torch.manual_seed(0)
    rows = batch * (1 + windows)
    tensors = moved((4 * torch.randn(rows, classes, h, w), 3 * torch.randn(rows, 1, h, w)), dtype)
    geometry: dict[str, Any] = {}
    if windows:
        step = max(width // 3, 1)
        canvas = (height, width + step)
        geometry = {"crop_size": (height, width), "canvas_size": canvas, "windows": [(0, 0), (0, step)]}
    seen = labels.some_seen(classes)

    def call(logits: Tensor, trusty: Tensor) -> Any:
        return masks_to_labels(logits, (height, width), seen, 0.1, trusty, return_details=True, **geometry)

    def judge(logits: Tensor, trusty: Tensor) -> None:
        labels.check(logits, (height, width), seen, 0.1, trusty_logits=trusty, **geometry)

    size, canvas = (height, width), geometry.get("canvas_size", (height, width))
    offsets = [n for window in geometry.get("windows", [(0, 0)]) for n in window]
    rest = (seen, 0.1, "both", size, size, canvas, offsets, 1, torch.int64, True)
    return Problem("masks_to_labels", tensors, call, judge=judge, rest=rest)


def make_proposals_to_labels(shape: tuple[Any, ...], dtype: torch.dtype, logits: bool) -> Problem:
    batch, count, classes, h, w, padded, image, size = shape
    torch.manual_seed(0)
    weights, masks = fusion.peaked(batch, count, classes), fusion.blobs(batch, count, *((h, w) if logits else padded))
    options = {"logits": logits, "image_size": image, **({"padded_size": padded} if logits else {})}
    tensors = moved((weights, masks if logits else masks.sigmoid()), dtype)

    def call(weights: Tensor, masks: Tensor) -> Any:
        return proposals_to_labels(weights, masks, size, return_scores=True, **options)

    def judge(weights: Tensor, masks: Tensor) -> None:
        fusion.check(weights, masks, size, **options)

    return Problem("proposals_to_labels", tensors, call, judge=judge)


# The families --------------------------------------------------------------------------------------------------------


def shapes(tiny: Any, odd: Any, published: Mapping[str, Any]) -> dict[str, Any]:
    """tiny: what a dry run and the memory checkers take; the odd ones of tests/ops; the published sizes."""
    named = odd if isinstance(odd, Mapping) else {f"odd{i}": shape for i, shape in enumerate(odd)}
    return {"tiny": tiny, **(named | dict(published) if ON_GPU else {})}


_attention = shapes(
    (3, 2, 5, 40, 16),
    [s for s in attention.SHAPES if s[3] > 16],
    {"coco171": (2, 8, 171, 1024, 64), "ade847": (1, 12, 847, 1600, 64)},
)
_descriptor = shapes(
    ((3, 2), 5, 12, 20),
    descriptor.SHAPES,
    {"coco171": ((2,), 171, 512, 512), "coco171-M16": ((2, 16), 171, 512, 512)},
)
_loss = shapes((3, 3, 2, 3, 9, 14), loss.SMALL + loss.LARGE, {"coco171": (2, 171, 32, 32, 512, 512)})
_proposals = shapes(
    (3, 2, 64, 18, 35),
    proposals.SMALL + proposals.LARGE,
    {"maft-100": (2, 12, 64, 100, 900), "maft-300": (1, 12, 64, 300, 1024)},
)
_bridge = shapes(
    (3, 1, 64, 2, (5, 6), (2, 3)),
    bridge.SMALL + bridge.LARGE,
    {"M16": (2, 12, 64, 11, (32, 32), (4, 4)), "M1024": (2, 12, 64, 101, (32, 32), (32, 32))},
)
_bits = shapes((3, 2, (7, 9), (28, 36), (4, 9)), bits.CASES, {"maft-100": (2, 100, (160, 216), (640, 864), (30, 40))})
_labels = shapes(
    (3, 5, 3, 4, (13, 17)),
    labels.SHAPES | labels.LARGE,
    {"coco171": (2, 171, 32, 32, (512, 512)), "ade847": (1, 847, 40, 40, (640, 640))},
)
_fusion = shapes(
    (3, 6, 5, 3, 4, (12, 16), (11, 16), (13, 17)),
    fusion.SHAPES | fusion.LARGE,
    {"maft-100": (1, 100, 171, 160, 216, (640, 864), (640, 853), (480, 640))},
)

FAMILIES = {
    "add_layer_norm": Family(
        "add_layer_norm",
        make_add_layer_norm,
        shapes((3, 5, 32), [s for s in adding.SHAPES if 0 not in s], {"coco-vit-b16": (2, 1025, 768)}),
        differentiable=False,
    ),
    "attention_to_mask": Family("attention_to_mask", make_attention_to_mask, _attention, products=True),
    "attention_to_mask:dropout": Family(
        "attention_to_mask",
        partial(make_attention_to_mask, dropout_p=0.1, seed=attention.SEED),
        _attention,
        products=True,
    ),
    "relationship_descriptor": Family(
        "relationship_descriptor", partial(make_relationship_descriptor, cached=False), _descriptor, products=True
    ),
    "relationship_descriptor:cached": Family(
        "relationship_descriptor", partial(make_relationship_descriptor, cached=True), _descriptor, products=True
    ),
    "mask_loss": Family("mask_loss", partial(make_mask_loss, gamma=2.0), _loss),
    "mask_loss:gamma": Family("mask_loss", partial(make_mask_loss, gamma=1.5), _loss),
    "proposal_attention": Family(
        "proposal_attention", partial(make_proposal_attention, kind="mixed"), _proposals, products=True
    ),
    "proposal_attention:sparse": Family(
        "proposal_attention", partial(make_proposal_attention, kind="sparse"), _proposals, products=True
    ),
    "region_bridge_attention": Family(
        "region_bridge_attention", partial(make_region_bridge_attention, skip=False), _bridge, products=True
    ),
    "region_bridge_attention:skip": Family(
        "region_bridge_attention", partial(make_region_bridge_attention, skip=True), _bridge, products=True
    ),
    "masks_to_bits": Family("masks_to_bits", make_masks_to_bits, _bits, differentiable=False),
    "masks_to_labels": Family(
        "masks_to_labels", partial(make_masks_to_labels, windows=False), _labels, differentiable=False
    ),
    "masks_to_labels:windows": Family(
        "masks_to_labels", partial(make_masks_to_labels, windows=True), _labels, differentiable=False
    ),
    "proposals_to_labels": Family(
        "proposals_to_labels", partial(make_proposals_to_labels, logits=True), _fusion, differentiable=False
    ),
    "proposals_to_labels:soft": Family(
        "proposals_to_labels", partial(make_proposals_to_labels, logits=False), _fusion, differentiable=False
    ),
}


def backends_of(op: str) -> list[str]:
    """What can run on this device, in the order of `auto`."""
    elsewhere = "cpp" if ON_GPU else "cuda"
    names = [name for name in _dispatch.BACKENDS if name in _dispatch.registered(op)]
    return [name for name in names if name != elsewhere]


def passes_of(family: Family, backend: str) -> tuple[str, ...]:
    """The backward pass too, where the op has one and the backend did not leave it to others."""
    op = f"{family.op}_backward"
    forward_alone = op in _dispatch.registered() and backend not in _dispatch.registered(op)
    return ("forward", "backward") if family.differentiable and not forward_alone else ("forward",)


def skip_if_refused(op: str, backend: str, problem: Problem) -> None:
    """Within `use_backend`: what a backend does not take is skipped with its own words."""
    reasons = _dispatch.objections(op, backend, *problem.tensors, *problem.rest)
    if reasons:
        pytest.skip("; ".join(reasons))
