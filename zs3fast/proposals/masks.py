"""Mask proposals: what a proposer is, and how masks from anywhere become `Proposals`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.proposals.components import label_masks
from zs3fast.proposals.frames import DIVISOR, LONG_SIDE, SHORT_SIDE, frame_size, padded_size
from zs3fast.types import Proposals
from zs3fast.utils.waiting import check

_AT_ONCE = 8
_CHECKED = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64)  # checked as they are


@runtime_checkable
class MaskProposer(Protocol):
    """Finds regions in images.

    pictures: uint8 [H, W, 3] arrays, RGB, of any sizes. names: their file names, of use only to proposers that read
    masks from files.
    """

    def __call__(self, pictures: Sequence[np.ndarray], names: Sequence[str] | None = None) -> Proposals: ...


def for_classes(proposer: MaskProposer, text_embeddings: Tensor) -> MaskProposer:
    """The proposer for a class list [C, D]: itself, or what its `for_vocabulary` gives where proposals depend on it."""
    bind = getattr(proposer, "for_vocabulary", None)
    return proposer if bind is None else bind(text_embeddings)


def from_masks(
    masks: Sequence[Tensor | np.ndarray] | Tensor | np.ndarray,
    original_sizes: Sequence[tuple[int, int]] | None = None,
    *,
    class_scores: Sequence[Tensor | np.ndarray] | None = None,
    class_names: Sequence[str] | None = None,
    quality: Sequence[Tensor | np.ndarray] | None = None,
    short_side: int = SHORT_SIDE,
    long_side: int = LONG_SIDE,
    divisor: int = DIVISOR,
) -> Proposals:
    """Any masks of images as `Proposals` on MAFT's frame: ground truth, somebody's predictions, drawings.

    Masks are resized with the image (bilinear, averaging where they shrink) and padded with zeros; where images
    have different counts, empty rows with `valid=False` follow.

    Args:
        masks: one item an image, [Nq_i, H_i, W_i] at the image's own size: bool, integers 0 and 1, or floats in
            [0, 1]. Nq_i = 0 is fine for some of the images.
        original_sizes: (H, W) of each image; masks of another size are an error. None: the masks' own.
        class_scores: one item an image, [Nq_i, K + 1] probabilities, last column = no object.
        class_names: the names of the K columns.
        quality: one item an image, [Nq_i] in [0, 1].
    Raises:
        ValueError: no mask at all, only empty masks, a wrong shape, size, count or range, or a value that is nan.
    """
    rows = [_mask_rows(item, f"masks[{index}]") for index, item in enumerate(_images_of(masks))]
    if not any(len(item) for item in rows):
        raise ValueError("masks: expected at least one proposal, got none")
    if not any(bool(item.any()) for item in rows):
        raise ValueError("masks: expected at least one with a pixel in it, got empty ones alone")
    own_sizes = [(int(item.shape[1]), int(item.shape[2])) for item in rows]
    if original_sizes is not None:
        _check_sizes(own_sizes, original_sizes)
    frame = {"short_side": short_side, "long_side": long_side, "divisor": divisor}
    return _on_frame(rows, class_scores, class_names, quality, **frame)


def from_labels(
    labels: Sequence[Tensor | np.ndarray] | Tensor | np.ndarray,
    *,
    ignore_index: int = 255,
    connected: bool = False,
    min_area: int = 1,
    short_side: int = SHORT_SIDE,
    long_side: int = LONG_SIDE,
    divisor: int = DIVISOR,
) -> Proposals:
    """Ground-truth proposals: one mask a class, or a connected region, of each label map.

    Args:
        labels: one integer map [H_i, W_i] an image. A map that is all `ignore_index` gives no proposal, no error.
        connected, min_area: see `label_masks`.
    """
    rows = [
        label_masks(item, ignore_index=ignore_index, connected=connected, min_area=min_area)[0].float()
        for item in labels
    ]
    if not rows:
        raise ValueError("labels: expected at least one label map, got none")
    return _on_frame(rows, short_side=short_side, long_side=long_side, divisor=divisor)


def soft_masks(proposals: Proposals) -> Tensor:
    """The masks on the padded frame, [B, Nq, Hp, Wp] in [0, 1]: `masks`, or sigmoid(bilinear(mask_logits))."""
    if proposals.masks is not None:
        return proposals.masks
    assert proposals.mask_logits is not None  # one of both is set
    return F.interpolate(
        proposals.mask_logits.float(),
        size=proposals.padded_size,
        mode="bilinear",
        align_corners=proposals.align_corners,
    ).sigmoid()


def check_proposals(proposals: Proposals, original_sizes: Sequence[tuple[int, int]] | None = None) -> None:
    """Raise a ValueError naming the field that is wrong; Nq = 0 is well-formed.

    Args:
        original_sizes: (H, W) of the images the proposals are to be used with. None: not compared.
    """
    given = proposals.mask_logits if proposals.masks is None else proposals.masks
    if given is None or (proposals.masks is not None and proposals.mask_logits is not None):
        which = "neither" if given is None else "both"
        raise ValueError(f"proposals: expected mask_logits or masks, got {which}")
    name = "mask_logits" if proposals.masks is None else "masks"
    if given.dim() != 4:
        raise ValueError(f"proposals: expected {name} [B, Nq, H, W], got {list(given.shape)}")
    batch, count = given.shape[:2]
    if proposals.masks is not None and tuple(given.shape[2:]) != tuple(proposals.padded_size):
        raise ValueError(
            f"proposals: expected masks of padded_size {list(proposals.padded_size)}, got {list(given.shape[2:])}"
        )
    expected = {"valid": (batch, count), "quality": (batch, count)}
    for field, shape in expected.items():
        tensor = getattr(proposals, field)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"proposals: expected {field} {list(shape)}, got {list(tensor.shape)}")
    _check_frames(proposals, batch)
    if original_sizes is not None:
        _check_sizes(proposals.original_sizes, original_sizes)
    _check_scores(proposals, batch, count)
    _check_values(given, name)


def _check_frames(proposals: Proposals, batch: int) -> None:
    for field in ("image_sizes", "original_sizes"):
        if len(getattr(proposals, field)) != batch:
            raise ValueError(
                f"proposals: expected {field} of {batch} images, as masks, got {len(getattr(proposals, field))}"
            )
    for size in proposals.image_sizes:
        if not (0 < size[0] <= proposals.padded_size[0] and 0 < size[1] <= proposals.padded_size[1]):
            raise ValueError(
                f"proposals: expected image sizes within padded_size {proposals.padded_size}, got {tuple(size)}"
            )


def _check_scores(proposals: Proposals, batch: int, count: int) -> None:
    scores, names = proposals.class_scores, proposals.class_names
    if scores is None:
        return
    if scores.dim() != 3 or tuple(scores.shape[:2]) != (batch, count):
        raise ValueError(f"proposals: expected class_scores [{batch}, {count}, K + 1], got {list(scores.shape)}")
    if names is not None and scores.shape[2] != len(names) + 1:
        raise ValueError(
            f"proposals: expected class_scores of {len(names) + 1} columns, got {scores.shape[2]}: one for each of the "
            f"{len(names)} class_names and one for no object"
        )
    unknown = scores.isnan().flatten(0, 1)  # a column of NaN is a class that the proposer does not know
    partly = unknown.any(0) & ~unknown.all(0)

    def error(place: list[int], value: float) -> ValueError:
        return ValueError(
            f"proposals: class_scores hold values that are not finite, first {value} at [b, n, class] = {place}"
        )

    last = torch.arange(scores.shape[2], device=scores.device) == scores.shape[2] - 1
    check(scores.isinf() | (scores.isnan() & (partly | last)), scores, error)


def _check_values(given: Tensor, name: str) -> None:
    if given.numel() == 0 or given.dtype == torch.bool:
        return

    def infinite(place: list[int], value: float) -> ValueError:
        return ValueError(f"{name}: expected finite values, got nan or infinity, first {value} at {place}")

    def outside(place: list[int], found: list[float]) -> ValueError:
        got = f"got {found[0]:g} to {found[1]:g}, the first outside at {place}"
        return ValueError(f"{name}: expected values in [0, 1], {got}")

    check(~torch.isfinite(given), given, infinite)
    if name != "mask_logits":
        check((given < 0) | (given > 1), lambda first: torch.stack(torch.aminmax(given)), outside)


def _check_sizes(own: Sequence[tuple[int, int]], expected: Sequence[tuple[int, int]]) -> None:
    if len(own) != len(expected):
        raise ValueError(f"masks: expected those of {len(expected)} images, got {len(own)}")
    for index, (got, want) in enumerate(zip(own, expected)):
        if tuple(got) != tuple(want):
            raise ValueError(f"masks[{index}]: expected masks of an image of {tuple(want)}, got {tuple(got)}")


def _images_of(masks: Sequence[Tensor | np.ndarray] | Tensor | np.ndarray) -> list[Tensor | np.ndarray]:
    if isinstance(masks, (Tensor, np.ndarray)) and masks.ndim != 4:
        raise ValueError(f"masks: expected [B, Nq, H, W] of a batch of equal sizes, got {list(masks.shape)}")
    if len(masks) == 0:
        raise ValueError("masks: expected the masks of at least one image, got none")
    return list(masks)


def _mask_rows(item: Tensor | np.ndarray, name: str) -> Tensor:
    if not isinstance(item, (Tensor, np.ndarray)):
        raise TypeError(f"{name}: expected a tensor or an array [Nq, H, W], got {type(item).__name__}")
    tensor = torch.as_tensor(item)
    if tensor.dim() != 3 or 0 in tensor.shape[1:]:
        raise ValueError(f"{name}: expected [Nq, H, W] with pixels in it, got {list(tensor.shape)}")
    if tensor.dtype not in _CHECKED:
        tensor = tensor.float()
    _check_values(tensor, name)
    return tensor


def _on_frame(
    rows: list[Tensor],
    class_scores: Sequence[Tensor | np.ndarray] | None = None,
    class_names: Sequence[str] | None = None,
    quality: Sequence[Tensor | np.ndarray] | None = None,
    *,
    short_side: int,
    long_side: int,
    divisor: int,
) -> Proposals:
    """Masks [Nq_i, H_i, W_i] at their images' sizes -> resized, padded and stacked."""
    originals = [(int(item.shape[1]), int(item.shape[2])) for item in rows]
    sizes = [frame_size(size, short_side, long_side) for size in originals]
    resized = [_resized(item, size) for item, size in zip(rows, sizes)]
    return stack_masks(resized, originals, padded_size(sizes, divisor), class_scores, class_names, quality)


def _resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [Nq, H, W] of any type as float32 [Nq, *size], some at a time: photos have millions of pixels."""
    result = torch.zeros(len(masks), *size, device=masks.device)
    for few, part in zip(masks.split(_AT_ONCE), result.split(_AT_ONCE)):
        if len(few):  # interpolate takes no empty batch
            part.copy_(F.interpolate(few[None].float(), size=size, mode="bilinear", antialias=True)[0].clamp_(0, 1))
    return result


def stack_masks(
    rows: Sequence[Tensor],
    original_sizes: Sequence[tuple[int, int]],
    padded: tuple[int, int],
    class_scores: Sequence[Tensor | np.ndarray] | None = None,
    class_names: Sequence[str] | None = None,
    quality: Sequence[Tensor | np.ndarray] | None = None,
) -> Proposals:
    """Masks [Nq_i, Hi, Wi] already at their frames' image sizes -> one batch, padded in space and in count."""
    count = max(len(item) for item in rows)
    masks = rows[0].new_zeros(len(rows), count, *padded)
    valid = torch.zeros(len(rows), count, dtype=torch.bool, device=masks.device)
    for index, item in enumerate(rows):
        masks[index, : len(item), : item.shape[1], : item.shape[2]] = item
        valid[index, : len(item)] = True
    proposals = Proposals(
        mask_logits=None,
        masks=masks,
        valid=valid,
        padded_size=padded,
        image_sizes=tuple((int(item.shape[1]), int(item.shape[2])) for item in rows),
        original_sizes=tuple((int(size[0]), int(size[1])) for size in original_sizes),
        class_scores=_pad_rows(class_scores, rows, "class_scores"),
        class_names=None if class_names is None else tuple(class_names),
        quality=_pad_rows(quality, rows, "quality"),
    )
    check_proposals(proposals)
    return proposals


def _pad_rows(values: Sequence[Tensor | np.ndarray] | None, rows: Sequence[Tensor], name: str) -> Tensor | None:
    if values is None:
        return None
    if len(values) != len(rows):
        raise ValueError(f"{name}: expected those of {len(rows)} images, got {len(values)}")
    tensors = [torch.as_tensor(value).to(rows[0]) for value in values]
    for index, (tensor, item) in enumerate(zip(tensors, rows)):
        if tensor.dim() != (2 if name == "class_scores" else 1) or len(tensor) != len(item):
            raise ValueError(f"{name}[{index}]: expected one row for each of {len(item)} masks, got {tensor.shape}")
        if tensor.shape[1:] != tensors[0].shape[1:]:
            raise ValueError(
                f"{name}[{index}]: expected {tensors[0].shape[1]} columns, as the first image's, got {tensor.shape[1]}"
            )
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
