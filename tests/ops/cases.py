"""One row an op: how to draw a request for it and how to judge a result. test_contract.py and tests/fuzz use them.

`draw` gives keyword arguments of the public function, valid ones, of any size that is quick. `judge` compares what a
backend gave with the public function on the reference backend in float64, `want`; the default is one relative error.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import zs3fast.ops
from zs3fast.ops import _dispatch, use_backend
from zs3fast.ops.masks_to_labels import reference_scores as label_scores
from zs3fast.ops.proposals_to_labels import reference_scores as proposal_scores

Request = dict[str, Any]


class Draw:
    """Random sizes, numbers and tensors from one seed. `layout` None: tensors of any memory layout."""

    def __init__(self, seed: int, layout: str | None = "contiguous", scale: float = 1.0) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.layout, self.scale = layout, scale

    def size(self, largest: int, least: int = 1) -> int:
        return self.random.randint(least, largest)

    def batch(self) -> int:
        return self.random.choice((1, 1, 2, 3))

    def width(self) -> int:
        return self.random.choice((1, 3, 5, 8, 16, 24, 33))

    def pair(self, largest: int) -> tuple[int, int]:
        return self.size(largest), self.size(largest)

    def flip(self) -> bool:
        return self.random.random() < 0.5

    def tensor(self, *shape: int) -> Tensor:
        return self.lay_out(torch.randn(shape, generator=self.torch) * self.scale)

    def chance(self, *shape: int) -> Tensor:
        return self.lay_out(torch.rand(shape, generator=self.torch))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return self.lay_out(torch.randint(low, high, shape, generator=self.torch))

    def lay_out(self, x: Tensor) -> Tensor:
        return LAYOUTS[self.layout or self.random.choice(list(LAYOUTS))](x, self.random)


def _transposed(x: Tensor, rng: random.Random) -> Tensor:
    order = rng.sample(range(x.ndim), x.ndim)
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])


def _sliced(x: Tensor, rng: random.Random) -> Tensor:
    """Every second element, and an offset, of one dimension of a larger tensor of NaN (or the largest integer)."""
    if x.ndim == 0:
        return x
    dim = rng.randrange(x.ndim)
    shape = list(x.shape)
    shape[dim] = 2 * shape[dim] + 3
    rubbish = float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    wide = torch.full(shape, rubbish, dtype=x.dtype)
    part = wide.narrow(dim, 1, 2 * x.shape[dim]).unflatten(dim, (x.shape[dim], 2)).select(dim + 1, 0)
    return part.copy_(x)


def _broadcast(x: Tensor, rng: random.Random) -> Tensor:
    dims = [i for i, n in enumerate(x.shape) if n > 0]
    if not dims:
        return x
    dim = rng.choice(dims)
    return x.narrow(dim, 0, 1).expand(x.shape)


def _channels_last(x: Tensor, _rng: random.Random) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


LAYOUTS: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "contiguous": lambda x, _: x,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced": _sliced,
    "broadcast": _broadcast,
}


# --- judging ---------------------------------------------------------------------------------------------------------


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a result, None left out."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [x for x in values if isinstance(x, Tensor)]


def close(_request: Request, got: Any, want: Any, tolerance: float = 2e-5, least: float = 1e-6) -> None:
    """NaN in the same places, and an error relative to the result, or to 1 % of the largest one if that is more."""
    pairs = list(zip(tensors_of(got), tensors_of(want), strict=True))
    sizes = [w[w.isfinite()].norm().item() for _, w in pairs if w.is_floating_point()]
    least = max(0.01 * max(sizes, default=0.0), least)
    for i, (g, w) in enumerate(pairs):
        assert g.shape == w.shape, f"result {i}: shape {list(g.shape)}, the reference has {list(w.shape)}"
        if not g.is_floating_point():
            assert torch.equal(g, w), f"result {i} differs"
            continue
        g = g.double()
        assert torch.equal(g.isnan(), w.isnan()), f"result {i}: {g.isnan().sum()} NaN, the reference {w.isnan().sum()}"
        finite = w.isfinite()
        error = (g - w)[finite].norm() / w[finite].norm().clamp_min(least)
        assert error <= tolerance, f"result {i}: error {error:.1e}"


def close_after_activation(request: Request, got: Any, want: Any) -> None:
    """As `close`; GELU's 1 + erf cancels far below 0, so that its errors are of the size of what it is taken of."""
    before = request["x"].double() @ request["weight"].double().mT
    before = before if request["bias"] is None else before + request["bias"].double()
    size = before[before.isfinite()].norm().item() if request["activation"] == "gelu" else 0.0
    close(request, got, want, least=max(0.01 * size, 1e-6))


def close_after_int8(request: Request, got: Any, want: Any) -> None:
    weight = request["weight"].double() * request["scale"].double()[:, None]
    close_after_activation(request | {"weight": weight}, got, want)


def _widened(request: Request) -> Request:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in request.items()}


def _best(scores: Tensor, labels: Tensor, tolerance: float) -> None:
    """Every label is of a score within `tolerance` of the largest; NaN is the largest."""
    chosen = scores.gather(1, labels.long().unsqueeze(1))[:, 0]
    largest = scores.max(1).values  # NaN if there is one
    right = torch.where(largest.isnan(), chosen.isnan(), chosen >= largest - tolerance)
    assert right.all(), f"{(~right).sum()} labels of {right.numel()} are not of the best class"


def judge_labels(request: Request, got: Any, _want: Any) -> None:
    wide = _widened(request)
    keys = ("mask_logits", "size", "seen", "seen_offset", "trusty_logits", "trusty_weighting", "crop_size")
    arguments = {k: wide[k] for k in (*keys, "canvas_size", "windows") if k in wide}
    scores = label_scores(**arguments)
    labels, best = (got.labels, got.scores) if request.get("return_details") else (got, None)
    if request.get("top_k", 1) > 1:
        assert labels.shape[1] == request["top_k"] and labels.sort(1).values.diff(dim=1).all()  # each class once
        labels, best = labels[:, 0], None if best is None else best[:, 0]
    largest = scores.max(1).values
    narrow = label_scores(**{k: v.float() if isinstance(v, Tensor) else v for k, v in arguments.items()})
    rounded = narrow.isnan().any(1) != largest.isnan()  # a weight that is 0 but for how a position is rounded
    if largest.isnan().any() or rounded.any():  # what is NaN by a weight of 0 alone may be so or not
        maps = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
        marked = label_scores(**arguments | {k: v.isnan().double() for k, v in maps.items()})
        blank = label_scores(**arguments | {k: torch.zeros_like(v) for k, v in maps.items()})
        unsure = rounded | largest.isnan() & (marked == blank).all(1)
        labels = torch.where(unsure, scores.max(1).indices, labels.long())
        best = None if best is None else torch.where(unsure, largest, best.double())
    _best(scores, labels, 3e-5 * (1 + scores.nan_to_num().abs().max().item() if scores.numel() else 1))
    if best is not None:
        close(request, best, largest, 1e-4)


def judge_proposals(request: Request, got: Any, _want: Any) -> None:
    wide = _widened(request)
    keys = ("class_weights", "masks", "size", "logits", "padded_size", "image_size", "align_corners")
    scores = proposal_scores(**{k: wide[k] for k in keys if k in wide})
    labels = got[0] if request.get("return_scores") else got
    size = wide["class_weights"].nan_to_num().abs().sum(1).max().item() if scores.numel() else 1
    _best(scores, labels, 3e-5 * (1 + size))


def judge_bits(request: Request, got: Any, want: Any) -> None:
    """Bits differ only where the mask is about one half."""
    patches = request["grid"][0] * request["grid"][1]
    off = zs3fast.ops.unpack_bits(got, patches) != zs3fast.ops.unpack_bits(want, patches)
    if off.any():
        from zs3fast.ops.masks_to_bits import _reference_soft

        padded = request.get("padded_size") or request["masks"].shape[-2:]
        logits, aligned = request.get("logits", False), request.get("align_corners", False)
        soft = _reference_soft(request["masks"].double(), request["grid"], padded, aligned, logits).flatten(2)
        assert (soft[off] - 0.5).abs().max() <= 1e-5, "a bit of a clear mask differs"


# --- drawing ---------------------------------------------------------------------------------------------------------


def _add_layer_norm(d: Draw) -> Request:
    shape = (d.batch(), d.size(20), d.width())
    return {
        "x": d.tensor(*shape),
        "residual": d.tensor(*shape),
        "weight": d.tensor(shape[-1]),
        "bias": d.tensor(shape[-1]) if d.flip() else None,
        "eps": d.random.choice((1e-5, 1e-3)),
    }


def _attention_to_mask(d: Draw) -> Request:
    B, heads, C, N, dh = d.batch(), d.size(3), d.size(7), d.size(40), d.width()
    masks_alone = d.random.random() < 0.2
    return {
        "q": d.tensor(B, heads, C, dh),
        "k": d.tensor(B, heads, N, dh),
        "v": None if masks_alone else d.tensor(B, heads, N, dh),
        "scale": dh**-0.5,
        "dropout_p": 0.0 if d.flip() else 0.4,
        "need_masks": masks_alone or d.flip(),
        "seed": d.size(2**40),
    }


def _encoder_attention(d: Draw) -> Request:
    B, heads, T, S, dh = d.batch(), d.size(3), d.size(40), d.size(40), d.width()
    context = None
    if d.flip():
        context = tuple(d.tensor(d.random.choice((1, B)), d.size(5), heads, dh) for _ in range(1))
        context = (context[0], d.lay_out(torch.randn(context[0].shape, generator=d.torch)))
    return {
        "q": d.tensor(B, T, heads, dh),
        "k": d.tensor(B, S, heads, dh),
        "v": d.tensor(B, S, heads, dh),
        "context": context,
        "scale": None if d.flip() else 0.3,
    }


def _fused_linear(d: Draw) -> Request:
    rows, width, out = (d.batch(), d.size(20)), d.width(), d.size(40)
    return {
        "x": d.tensor(*rows, width),
        "weight": d.tensor(out, width),
        "bias": d.tensor(out) if d.flip() else None,
        "activation": d.random.choice(("none", "quick_gelu", "gelu", "relu")),
        "residual": d.tensor(*rows, out) if d.flip() else None,
    }


def _fused_linear_int8(d: Draw) -> Request:
    rows, width, out = (d.batch(), d.size(40)), d.random.choice((64, 192)), d.random.choice((32, 160))
    return {
        "x": d.tensor(*rows, width),
        "weight": d.lay_out(torch.randint(-127, 128, (out, width), generator=d.torch, dtype=torch.int8)),
        "scale": 0.01 * d.chance(out),
        "bias": d.tensor(out) if d.flip() else None,
        "activation": d.random.choice(("none", "quick_gelu", "gelu", "relu")),
        "residual": d.tensor(*rows, out) if d.flip() else None,
    }


def _mask_loss(d: Draw) -> Request:
    B, C, (h, w), (H, W) = d.batch(), d.size(6), d.pair(9), d.pair(30)
    labels = d.integers(0, C + 1, B, H, W)
    return {
        "mask_logits": d.tensor(B, C, h, w),
        "labels": torch.where(labels == C, 255, labels).to(d.random.choice((torch.int64, torch.int32, torch.uint8))),
        "alpha": d.random.random(),
        "gamma": d.random.choice((0.0, 1.0, 2.0, 3.5)),
    }


def _masks_to_bits(d: Draw) -> Request:
    logits = d.flip()
    shape = (d.batch(), d.size(4), *d.pair(20))
    request: Request = {"masks": d.tensor(*shape) if logits else d.chance(*shape), "grid": d.pair(12), "logits": logits}
    if logits and d.flip():
        request |= {"padded_size": d.pair(40), "align_corners": d.flip()}
    return request


def _masks_to_labels(d: Draw) -> Request:
    images, C, (h, w), size = d.batch(), d.size(9), d.pair(8), d.pair(24)
    request: Request = {"size": size, "seen": d.random.sample(range(C), d.size(C, 0)), "seen_offset": 0.1}
    windows = 1
    if d.flip():
        crop = d.pair(20)
        canvas = (crop[0] + d.size(crop[0], 0), crop[1] + d.size(crop[1], 0))
        offsets = [(y, x) for y in {0, canvas[0] - crop[0]} for x in {0, canvas[1] - crop[1]}]
        windows = len(offsets)
        request |= {"crop_size": crop, "canvas_size": canvas, "windows": offsets}
    request["mask_logits"] = d.tensor(images * windows, C, h, w)
    if d.flip():
        request["trusty_logits"] = d.tensor(images * windows, 1, *((h, w) if d.flip() else d.pair(8)))
        request["trusty_weighting"] = d.random.choice(("both", "seen", "unseen", "off"))
    request["top_k"] = d.size(C) if d.random.random() < 0.3 else 1
    request["dtype"] = d.random.choice((torch.int64, torch.int32, torch.int16, torch.uint8))
    request["return_details"] = d.flip()
    return request


def _proposal_attention(d: Draw) -> Request:
    B, heads, Nq, N, dh = d.batch(), d.size(3), d.size(20), d.size(70), d.width()
    keep = d.random.choice((0.0, 0.1, 0.7, 1.0))
    own = {label: d.tensor(B, heads, Nq, dh) for label in ("q", "k_self", "v_self")}
    of_patches = {label: d.tensor(B, heads, N, dh) for label in ("k", "v")}
    return own | of_patches | {"masks": d.chance(B, Nq, N) < keep, "scale": None if d.flip() else 0.3}


def _proposals_to_labels(d: Draw) -> Request:
    B, Nq, C, logits, shape = d.batch(), d.size(6, 0), d.size(9), d.flip(), d.pair(12)
    padded = d.pair(30) if logits and d.flip() else shape
    masks = d.tensor(B, Nq, *shape) if logits else d.chance(B, Nq, *shape)
    return {
        "class_weights": d.tensor(B, Nq, C),
        "masks": masks,
        "size": d.pair(40),
        "logits": logits,
        "padded_size": padded,
        "image_size": (d.size(padded[0]), d.size(padded[1])) if d.flip() else None,
        "align_corners": d.flip(),
        "dtype": d.random.choice((torch.int64, torch.int32, torch.int16, torch.uint8)),
        "return_scores": d.flip(),
    }


def _refine_maps(d: Draw) -> Request:
    B, size = d.batch(), (d.size(24, 4), d.size(24, 4))
    image = d.tensor(B, 3, *size)
    if 0 in image.stride():  # where neighbours are equal their spread is rounding alone, and divided by
        image = torch.randn(image.shape, generator=d.torch)
    return {
        "image": image,
        "maps": d.tensor(B, d.size(4), *d.pair(8)),
        "size": None if d.flip() else size,
        "steps": d.size(3),
        "dilations": (1, 2),
    }


def _region_bridge_attention(d: Draw) -> Request:
    B, heads, dh, grid, prefix = d.batch(), d.size(3), d.width(), d.pair(6), d.size(4)
    regions = d.size(grid[0]), d.size(grid[1])
    others, skip = grid[0] * grid[1] + regions[0] * regions[1], d.flip()
    return {
        "q": d.tensor(B, heads, (1 if skip else prefix) + others, dh),
        "k": d.tensor(B, heads, prefix + others, dh),
        "v": d.tensor(B, heads, prefix + others, dh),
        "num_prefix": prefix,
        "grid": grid,
        "regions": regions,
        "scale": None if d.flip() else 0.3,
        "skip_prompts": skip,
    }


def _relationship_descriptor(d: Draw) -> Request:
    C, D, wide = d.size(6), d.width(), d.size(12)
    return {
        "text": d.tensor(C, D),
        "visual": d.tensor(d.batch(), *((d.size(4),) if d.flip() else ()), D),
        "weight": d.tensor(wide, 2 * D),
        "bias": d.tensor(wide) if d.flip() else None,
        "text_term": d.tensor(C, wide) if d.flip() else None,
    }


def _self_similarity_attention(d: Draw) -> Request:
    B, heads, dh, grid, prefix = d.batch(), d.size(3), d.width(), d.pair(6), d.size(3, 0)
    shape = (B, heads, prefix + grid[0] * grid[1], dh)
    return {
        "q": d.tensor(*shape),
        "k": d.tensor(*shape),
        "v": d.tensor(*shape),
        "similarity": d.random.choice(("qq", "kk", "qq+kk", "qk")),
        "scale": dh**-0.5,
        "grid": grid,
        "num_prefix": prefix,
        "std": None if d.flip() else 2.0,
    }


@dataclass(frozen=True)
class Case:
    """A row: how the op is drawn, and how it is judged.

    differentiable: the tensors whose gradients are compared.
    batched:        the tensors whose first dimension may be 0, all at once.
    free:           another size that an exported program and an empty request leave open: tensor -> its dimension.
    """

    draw: Callable[[Draw], Request]
    judge: Callable[[Request, Any, Any], None] = close
    differentiable: tuple[str, ...] = ()
    batched: tuple[str, ...] = ()
    free: tuple[tuple[str, int], ...] = ()

    def sizes(self) -> list[dict[str, int]]:
        """The sizes that may be any, 0 included: each as tensor -> dimension."""
        return [{label: 0 for label in self.batched}] + ([dict(self.free)] if self.free else [])


_QKV = ("q", "k", "v")
CASES: dict[str, Case] = {
    "add_layer_norm": Case(_add_layer_norm, close, (), ("x", "residual")),
    "attention_to_mask": Case(_attention_to_mask, close, _QKV, _QKV, (("q", 2),)),
    "encoder_attention": Case(_encoder_attention, close, _QKV, _QKV),
    "fused_linear": Case(_fused_linear, close_after_activation, ("x", "weight", "bias", "residual"), ("x", "residual")),
    "fused_linear_int8": Case(_fused_linear_int8, close_after_int8, (), ("x", "residual")),
    "mask_loss": Case(_mask_loss, close, ("mask_logits",), ("mask_logits", "labels")),
    "masks_to_bits": Case(_masks_to_bits, judge_bits, (), ("masks",)),
    "masks_to_labels": Case(_masks_to_labels, judge_labels, (), ("mask_logits", "trusty_logits")),
    "proposal_attention": Case(
        _proposal_attention,
        close,
        ("q", "k_self", "v_self", "k", "v"),
        ("q", "k_self", "v_self", "k", "v", "masks"),
        (("q", 2), ("k_self", 2), ("v_self", 2), ("masks", 1)),
    ),
    "proposals_to_labels": Case(
        _proposals_to_labels, judge_proposals, (), ("class_weights", "masks"), (("class_weights", 1), ("masks", 1))
    ),
    "refine_maps": Case(_refine_maps, close, (), ("image", "maps")),
    "region_bridge_attention": Case(_region_bridge_attention, close, _QKV, _QKV),
    "relationship_descriptor": Case(
        _relationship_descriptor,
        close,
        ("text", "visual", "weight", "bias", "text_term"),
        ("visual",),
        (("text", 0), ("text_term", 0)),
    ),
    "self_similarity_attention": Case(_self_similarity_attention, close, _QKV, _QKV),
}


def run(op: str, request: Request, backend: str) -> Any:
    """The public function on one backend; a NamedTuple or tuple as it is."""
    with use_backend(backend):
        return getattr(zs3fast.ops, op)(**request)


def want_of(op: str, request: Request) -> Any:
    """The definition in float64."""
    wide = _widened(request)
    if isinstance(wide.get("context"), tuple):
        wide["context"] = tuple(x.double() for x in wide["context"])
    return run(op, wide, "reference")


def refused(error: Exception) -> bool:
    """Whether a backend said that it cannot take a request."""
    return isinstance(error, RuntimeError) and "cannot take this request" in str(error)


def backends(op: str) -> list[str]:
    """The backends of an op that may run on this machine."""
    here = ["reference", "cpp", "triton"] if not torch.cuda.is_available() else ["reference", "cpp"]
    return [backend for backend in here if backend in _dispatch.registered(op)]


__all__ = ["CASES", "LAYOUTS", "Case", "Draw", "Request", "backends", "close", "refused", "run", "want_of"]
