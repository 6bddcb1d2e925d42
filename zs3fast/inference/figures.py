"""What the papers show of their methods, on any image: a sheet of panels from a Segmenter."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zs3fast.encoders.region_bridge import RegionBridgeClipViT
from zs3fast.inference.predictors import Proposing, Request, Windows, squash
from zs3fast.labels.windows import sliding_windows
from zs3fast.models.clip_rc import ClipRC
from zs3fast.models.clsclip import ClsCLIP
from zs3fast.ops.region_bridge_attention import region_of_patch
from zs3fast.proposals import for_classes, soft_masks
from zs3fast.proposals.class_columns import scores_for_classes
from zs3fast.utils.images import read_image
from zs3fast.utils.options import one_of
from zs3fast.utils.sheets import Panel, heat, labelled, sheet, shown

if TYPE_CHECKING:
    from zs3fast.inference.segmenter import Segmenter
    from zs3fast.types import Segmentation

_DIMMED = 0.3  # of the image outside a proposal


def figure(segmenter: Segmenter, image: Any, *, most: int = 6) -> Image.Image:
    """The figure of the segmenter's method (see `FIGURES`) for one image, with the segmenter's classes.

    Args:
        image: as for a Segmenter's call.  most: classes (ClsCLIP) or proposals (MAFT) that are shown.
    Raises:
        ValueError: a method without a figure of its own; `side_by_side` shows its labels.
    """
    one_of("method", segmenter.model.method, tuple(FIGURES))
    if most < 1:
        raise ValueError(f"most: expected at least 1, got {most}")
    pixels, source = read_image(image)
    with torch.no_grad():
        return sheet(FIGURES[segmenter.model.method](segmenter, pixels, source, most))


def side_by_side(segmenters: Sequence[tuple[str, Segmenter]], images: Sequence[Any]) -> Image.Image:
    """A row an image: the image, and the labels that each of several segmenters gives it, by name.

    All have the first one's classes, so that a colour means the same everywhere.
    """
    if not segmenters or not images:
        raise ValueError("segmenters, images: expected one at least of each, got none")
    return sheet([compared(segmenters, image) for image in images])


def compared(segmenters: Sequence[tuple[str, Segmenter]], image: Any) -> list[Panel]:
    """A row of `side_by_side`."""
    row: list[Panel] = []
    for name, segmenter in segmenters:
        result = cast("Segmentation", segmenter(image, segmenters[0][1].classes))
        if not row:
            row.append(Panel(_name(result.source), shown(result.image)))
        row.append(labelled(name, result.image, result.labels, result.class_names))
    return row


def trusty_map(segmenter: Segmenter, pixels: np.ndarray, source: str | None, most: int) -> list[list[Panel]]:
    """TagCLIP: where its trusty token takes pixels for a class that training never had."""
    result = segmenter(pixels, details=True)
    trusty = result.trusty_map()
    lines = [(None, "P(unseen): dark 0, bright 1"), (None, f"mean {trusty.mean():.2f}, highest {trusty.max():.2f}")]
    return [
        [
            Panel(_name(source), shown(pixels)),
            Panel("trusty map", heat(trusty, pixels), lines),
            labelled("labels", pixels, result.labels, result.class_names),
        ]
    ]


def region_map(segmenter: Segmenter, pixels: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """CLIP-RC: the class [H', W'] of the region each pixel of the resized image lies in, and of its windows as a whole.

    A region is of the class whose text its token is most like; where windows overlap their similarities are averaged.
    -1: in the margin that belongs to no region.
    """
    model, predictor = cast(ClipRC, segmenter.model), cast(Windows, segmenter._predictor)
    regions = cast(RegionBridgeClipViT, model.encoder).regions
    text = F.normalize(segmenter.embed().float(), dim=-1)
    canvas = predictor._canvas(Request(pixels, text, (), None))
    crop, stride = predictor._crop_and_stride()
    size = (canvas.shape[-2], canvas.shape[-1])
    total, cover, whole = torch.zeros(len(text), *size), torch.zeros(size), []
    for y, x in sliding_windows(size, crop, stride):
        features = model.encode(canvas[None, :, y : y + crop[0], x : x + crop[1]])
        assert features.region_tokens is not None  # the method has them
        alike = (F.normalize(features.region_tokens[0].float(), dim=-1) @ text.T).cpu()  # [M, C]
        whole.append(int((features.global_token[0].float() @ text.T).argmax()))
        of = region_of_patch(features.grid_size, regions).view(1, 1, *features.grid_size)
        region = F.interpolate(of.float(), crop, mode="nearest")[0, 0].long()
        inside = region >= 0
        place = (slice(y, y + crop[0]), slice(x, x + crop[1]))
        total[(slice(None), *place)] += alike.T[:, region.clamp_min(0)] * inside
        cover[place] += inside
    return torch.where(cover > 0, total.argmax(0), -1).numpy(), whole


def region_classes(segmenter: Segmenter, pixels: np.ndarray, source: str | None, most: int) -> list[list[Panel]]:
    """CLIP-RC: what its region tokens say of their windows, beside the labels."""
    result = segmenter(pixels)
    labels, whole = region_map(segmenter, pixels)
    names = result.class_names
    common = max(set(whole), key=whole.count)
    regions = labelled("regions", pixels, labels, names)
    said = "class token" if len(whole) == 1 else f"class tokens of {len(whole)} windows"
    return [
        [
            Panel(_name(source), shown(pixels), [(None, f"{said}: {names[common]}")]),
            Panel(regions.title, regions.picture, regions.lines),
            labelled("labels", pixels, result.labels, names),
        ]
    ]


def class_attention(segmenter: Segmenter, pixels: np.ndarray, source: str | None, most: int) -> list[list[Panel]]:
    """ClsCLIP: what the class token of each layer attends to, CLIP's own and that of the classes found."""
    model = cast(ClsCLIP, segmenter.model)
    result = segmenter(pixels)
    counts = np.bincount(result.labels[result.labels >= 0], minlength=len(result.class_names))
    chosen = np.argsort(-counts, kind="stable")[: min(most, len(counts))].tolist()
    like = next(model.parameters())
    image = squash(pixels, model.image_size, model.pixel_mean, model.pixel_std).to(like)[None]
    rows = [("CLIP's own [CLS]", model.class_attention(image)[:, 0])]
    if model.encoder.nav_layers:
        of_classes = model.class_attention(image, segmenter.embed()[chosen])
        rows += [(result.class_names[c], of_classes[:, i]) for i, c in enumerate(chosen)]
    said = [(None, "* the class's token is [CLS]")] if len(rows) > 1 else []
    panels = [
        [Panel(_name(source), shown(pixels), said), labelled("labels", pixels, result.labels, result.class_names)]
    ]
    return panels + [_attention_row(name, maps, pixels, model.encoder.nav_layers) for name, maps in rows]


def _attention_row(name: str, maps: Tensor, pixels: np.ndarray, navigated: Sequence[int]) -> list[Panel]:
    """A panel a layer, each on its own scale."""
    row: list[Panel] = []
    for layer, values in enumerate(maps.float().cpu().numpy()):
        what = f"{name}, layer {layer}" if not row else f"layer {layer}"
        lines = [(None, f"highest {values.max():.3f}"), (None, f"all patches {values.sum():.2f}")]
        mark = " *" if layer in navigated and not name.startswith("CLIP's") else ""
        row.append(Panel(what + mark, heat(values, pixels, float(values.max()), height=128), lines))
    return row


def proposal_classes(segmenter: Segmenter, pixels: np.ndarray, source: str | None, most: int) -> list[list[Panel]]:
    """MAFT: the five classes that each of the largest proposals is most like, with their probabilities."""
    predictor = cast(Proposing, segmenter._predictor)
    result = segmenter(pixels, source=source)
    encoded, text, names = predictor.encode(pixels, source), segmenter.embed(), result.class_names
    if encoded.proposals is None:  # its proposer is led by the class list
        encoded = predictor._embedded(encoded, for_classes(predictor.proposer, text), pixels, source)
    assert encoded.proposals is not None and encoded.embeddings is not None
    proposals = scores_for_classes(encoded.proposals, segmenter.classes or ())
    out = predictor.model.decode(encoded.embeddings, text, proposals, encoded.grid, non_object=False)
    share = out.proposal_logits[0].float().softmax(-1).cpu()
    height, width = proposals.image_sizes[0]
    masks = soft_masks(proposals)[0, :, :height, :width].cpu() * proposals.valid[0].cpu()[:, None, None]
    areas = (masks > 0.5).sum((1, 2))
    found = [q for q in areas.argsort(descending=True, stable=True).tolist() if areas[q] > 0][:most]
    panels = []
    for q in found:
        mask = F.interpolate(masks[None, None, q], pixels.shape[:2], mode="bilinear")[0, 0].numpy() > 0.5
        dimmed = np.where(mask[..., None], pixels, (pixels * _DIMMED).astype(np.uint8))
        best = share[q].topk(min(5, len(names)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        lines = [(None, f"{probability:.2f} {names[c]}") for probability, c in pairs]
        panels.append(Panel(f"proposal {q}", shown(dimmed), lines))
    first = [Panel(_name(source), shown(pixels)), labelled("labels", pixels, result.labels, names)]
    return [first, *(panels[i : i + 4] for i in range(0, len(panels), 4))]


def _name(source: str | None) -> str:
    return "image" if source is None else os.path.basename(source)


Figure = Callable[["Segmenter", np.ndarray, "str | None", int], list[list[Panel]]]
FIGURES: dict[str, Figure] = {
    "tagclip": trusty_map,
    "clip_rc": region_classes,
    "clsclip": class_attention,
    "maft": proposal_classes,
}
