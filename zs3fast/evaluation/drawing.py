"""Evaluation as images: the confusion matrix, and an image beside its truth, its prediction and the mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zs3fast.utils.rendering import UNLABELLED, palette

_RIGHT, _WRONG = np.array([23.0, 92.0, 156.0]), np.array([196.0, 62.0, 18.0])
_EMPTY = (225, 225, 225)
_INK, _UNSEEN_INK, _GREY = (20, 20, 20), (170, 60, 0), (110, 110, 110)
_MARGIN = 12
_LONGEST_NAME = 22


def confusion_image(table: np.ndarray, class_names: Sequence[str], seen: Iterable[int] | None = None) -> Image.Image:
    """The confusion as an image: a row of pixels' truth, a column of predictions, each row in shares of its pixels.

    The diagonal (right) is blue, the rest (wrong) red, both on a square-root scale, so that 1 % can be seen. Rows
    without a pixel are grey. Names stand beside the cells up to 171 classes, unseen ones in another colour; beyond that
    every 50th index.

    Args:
        table: int64 [C, C + 1] of `Confusion`; the last column is drawn where it holds anything.
    """
    classes = len(class_names)
    columns = [*class_names, "(none)"] if table[:, -1].any() else list(class_names)
    cell = 34 if classes <= 24 else 18 if classes <= 60 else 12 if classes <= 171 else 3
    font = ImageFont.load_default(min(13, max(cell - 2, 9)))
    unseen = set() if seen is None else set(range(classes)) - set(seen)
    rows = [_short(name) for name in class_names]
    label = round(max(font.getlength(name) for name in [*rows, "(none)"])) + 10
    cells = _cells(table[:, : len(columns)]).repeat(cell, 0).repeat(cell, 1)
    left, top = label + _MARGIN + 16, label + _MARGIN + 16
    image = Image.new("RGB", (max(left + cells.shape[1] + _MARGIN, 520), top + cells.shape[0] + 64), "white")
    image.paste(Image.fromarray(cells), (left, top))
    draw = ImageDraw.Draw(image)
    draw.rectangle((left - 1, top - 1, left + cells.shape[1], top + cells.shape[0]), outline=_GREY)
    every = 1 if cell >= 12 else 50
    for index in range(0, len(columns), every):
        middle = index * cell + cell // 2
        name = _short(columns[index]) if every == 1 else str(index)
        ink = _UNSEEN_INK if index in unseen else _INK
        if index < classes:
            draw.text((left - 5, top + middle), name, fill=ink, font=font, anchor="rm")
        _vertical(image, name, (left + middle, top - 5), font, ink)
    if cell >= 30:
        _numbers(draw, table[:, : len(columns)], (left, top), cell)
    _caption(draw, (left, top + cells.shape[0] + 10), bool(unseen))
    _vertical(image, "truth", (10, top + cells.shape[0] // 2), ImageFont.load_default(13), _GREY)
    draw.text((left, 4), "prediction", fill=_GREY, font=ImageFont.load_default(13))
    return image


def panels(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, ignored: np.ndarray, classes: int, side: int = 320
) -> list[Image.Image]:
    """Four thumbnails: the image, its truth, the prediction, and the mistakes in red.

    Args:
        image: uint8 [H, W, 3].  truth, prediction: [H, W] indices below `classes`, -1 where the image shows through.
        ignored: bool [H, W], pixels that are not scored; no mistake is shown there.
        side: the thumbnails' longer side.
    """
    height, width = truth.shape
    scale = side / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    rows = (np.arange(size[1]) + 0.5) * height / size[1]
    columns = (np.arange(size[0]) + 0.5) * width / size[0]
    nearest = np.ix_(rows.astype(int), columns.astype(int))
    photo = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    truth, prediction, ignored = truth[nearest], prediction[nearest], ignored[nearest]
    colours = palette(classes)
    wrong = (truth != prediction) & ~ignored
    faded = np.repeat(photo.mean(-1, keepdims=True), 3, -1) * 0.5 + 110
    mistakes = np.where(wrong[..., None], 0.35 * faded + 0.65 * np.array([220.0, 20.0, 20.0]), faded)
    images = [photo, _painted(photo, truth, colours), _painted(photo, prediction, colours), mistakes]
    return [Image.fromarray(pixels.round().astype(np.uint8)) for pixels in map(np.asarray, images)]


def _painted(photo: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    result = photo.astype(np.float32)
    labelled = labels != UNLABELLED
    result[labelled] = 0.35 * result[labelled] + 0.65 * colours[labels[labelled]]
    return result


def _shares(table: np.ndarray) -> np.ndarray:
    """Each row over its sum; nan where a row is empty."""
    total = table.sum(1, keepdims=True).astype(np.float64)
    out: np.ndarray = np.divide(table, total, out=np.full(table.shape, np.nan), where=total > 0)
    return out


def _cells(table: np.ndarray) -> np.ndarray:
    """Colours uint8 [rows, columns, 3]."""
    shares = _shares(table)
    diagonal = np.eye(*table.shape, dtype=np.bool_)[..., None]
    full = np.where(diagonal, _RIGHT, _WRONG)
    strength = np.sqrt(np.nan_to_num(shares))[..., None]
    colours = 255 + strength * (full - 255)
    return np.where(np.isnan(shares)[..., None], _EMPTY, colours).round().astype(np.uint8)


def _numbers(draw: ImageDraw.ImageDraw, table: np.ndarray, corner: tuple[int, int], cell: int) -> None:
    """Whole percents into the cells that reach one."""
    font = ImageFont.load_default(11)
    shares = np.nan_to_num(_shares(table))
    for row, column in zip(*np.nonzero(shares >= 0.005)):
        place = (corner[0] + column * cell + cell / 2, corner[1] + row * cell + cell / 2)
        ink = (255, 255, 255) if shares[row, column] > 0.35 else _INK
        draw.text(place, f"{100 * shares[row, column]:.0f}", fill=ink, font=font, anchor="mm")


def _caption(draw: ImageDraw.ImageDraw, corner: tuple[int, int], unseen: bool) -> None:
    font, (x, y) = ImageFont.load_default(12), corner
    for ramp, text in ((_RIGHT, "right"), (_WRONG, "wrong")):
        for step in range(100):
            colour = (255 + np.sqrt(step / 99) * (ramp - 255)).round().astype(int)
            draw.line((x + step, y, x + step, y + 12), fill=tuple(map(int, colour)))
        draw.rectangle((x - 1, y - 1, x + 100, y + 13), outline=_GREY)
        draw.text((x + 108, y + 6), f"{text}, 0 to 100 %", fill=_INK, font=font, anchor="lm")
        x += 220
    text = "rows sum to 100 % of a class's pixels; grey: none in the truth"
    draw.text((corner[0], y + 32), text, fill=_GREY, font=font, anchor="lm")
    if unseen:
        draw.text((corner[0], y + 47), "unseen classes in this colour", fill=_UNSEEN_INK, font=font, anchor="lm")


def _vertical(
    image: Image.Image,
    text: str,
    foot: tuple[int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    ink: tuple[int, int, int],
) -> None:
    """Text that is read upwards, its beginning at `foot`."""
    width, height = round(font.getlength(text)) + 2, round(getattr(font, "size", 11) * 1.4)
    line = Image.new("L", (width, height), 0)
    ImageDraw.Draw(line).text((0, height / 2), text, fill=255, font=font, anchor="lm")
    mask = line.rotate(90, expand=True)
    image.paste(Image.new("RGB", mask.size, ink), (foot[0] - height // 2, foot[1] - mask.height), mask)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."
