"""One picture of scenes, their truth and what methods make of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zs3fast.utils.rendering import UNLABELLED, palette

_SIDE, _GAP, _HEAD, _FOOT = 192, 8, 26, 20
_INK, _GREY, _UNSEEN = (20, 20, 20), (105, 105, 105), (170, 60, 0)

Row = tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]]  # image [H, W, 3], truth [H, W], predictions [H, W] each


def comparison(
    rows: Sequence[Row], names: Sequence[str], class_names: Sequence[str], unseen: Sequence[int]
) -> Image.Image:
    """A row a scene: the picture, its truth, one prediction a method with its share of right pixels, and a legend.

    Regions of unseen classes have a white outline in every column, and their names stand in another colour.
    """
    columns = ["scene", "truth", *names]
    legend = 230
    width = len(columns) * (_SIDE + _GAP) + legend
    height = _HEAD + len(rows) * (_SIDE + _FOOT + _GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    for column, name in enumerate(columns):
        draw.text((column * (_SIDE + _GAP) + _SIDE / 2, 5), name, fill=_INK, font=font, anchor="ma")
    colours = palette(len(class_names))
    for row, (image, truth, predictions) in enumerate(rows):
        top = _HEAD + row * (_SIDE + _FOOT + _GAP)
        outline = _outline(np.isin(truth, unseen), truth)
        panels = [image, *(_painted(labels, colours) for labels in (truth, *predictions))]
        for column, pixels in enumerate(panels):
            left = column * (_SIDE + _GAP)
            sheet.paste(_enlarged(pixels, outline if column else None), (left, top))
            if column > 1:
                share = f"{100 * (predictions[column - 2] == truth).mean():.0f} % right"
                draw.text((left + _SIDE / 2, top + _SIDE + 3), share, fill=_GREY, font=small, anchor="ma")
        _legend(draw, (width - legend + 4, top), truth, colours, class_names, unseen, small)
    return sheet


def _painted(labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return np.where((labels == UNLABELLED)[..., None], np.uint8(235), colours[np.maximum(labels, 0)])


def _outline(chosen: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Where a chosen pixel has a neighbour of another label, at the size of a panel."""
    rows = np.arange(_SIDE) * labels.shape[0] // _SIDE
    columns = np.arange(_SIDE) * labels.shape[1] // _SIDE
    chosen, labels = (np.pad(a[np.ix_(rows, columns)], 1, mode="edge") for a in (chosen, labels))
    inner = labels[1:-1, 1:-1]
    around = (labels[:-2, 1:-1], labels[2:, 1:-1], labels[1:-1, :-2], labels[1:-1, 2:])
    out: np.ndarray = chosen[1:-1, 1:-1] & np.any([inner != other for other in around], axis=0)
    return out


def _enlarged(pixels: np.ndarray, outline: np.ndarray | None) -> Image.Image:
    nearest = outline is not None
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
    picture = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize((_SIDE, _SIDE), how)).copy()
    if nearest:
        picture[outline] = 255
    return Image.fromarray(picture)


def _legend(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    truth: np.ndarray,
    colours: np.ndarray,
    class_names: Sequence[str],
    unseen: Sequence[int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    counts = np.bincount(truth.ravel(), minlength=len(class_names))
    for line, index in enumerate(sorted(np.flatnonzero(counts).tolist(), key=lambda c: -counts[c])):
        x, y = corner[0], corner[1] + 19 * line
        draw.rectangle((x, y + 2, x + 11, y + 13), fill=tuple(map(int, colours[index])), outline=_GREY)
        text, ink = (f"{class_names[index]} (unseen)", _UNSEEN) if index in unseen else (class_names[index], _INK)
        draw.text((x + 18, y + 8), text, fill=ink, font=font, anchor="lm")
