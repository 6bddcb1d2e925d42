"""Sheets of panels: images in rows, a title over each and what it says under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zs3fast.utils.fonts import font_for
from zs3fast.utils.rendering import BLEND, class_sums, overlay, palette

HEIGHT = 256  # of a panel's image
_GAP, _LINE, _TITLE = 10, 18, 24
_INK, _GREY = (20, 20, 20), (95, 95, 95)
Colour = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Panel:
    """An image of a sheet.

    title: over it.  picture: as high as all of the sheet.  lines: under it, each with a square of its colour or None.
    """

    title: str
    picture: Image.Image
    lines: Sequence[tuple[Colour | None, str]] = ()


def shown(pixels: np.ndarray, smooth: bool = True, height: int = HEIGHT) -> Image.Image:
    """uint8 [H, W, 3] as high as a panel."""
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return Image.fromarray(pixels).resize((_width(pixels, height), height), how)


def heat(values: np.ndarray, like: np.ndarray, highest: float = 1.0, height: int = HEIGHT) -> Image.Image:
    """A map [h, w], 0 dark and `highest` bright, as high and wide as an image uint8 [H, W, 3] is shown."""
    levels = np.clip(values / max(highest, 1e-12) * 255, 0, 255).astype(np.uint8)
    size = _width(like, height), height
    smooth = cv2.resize(levels, size, interpolation=cv2.INTER_LINEAR)
    return Image.fromarray(cv2.cvtColor(cv2.applyColorMap(smooth, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB))


def labelled(
    title: str, image: np.ndarray, labels: np.ndarray, names: Sequence[str], most: int = 6, height: int = HEIGHT
) -> Panel:
    """An image under the colours of its labels [H, W] (-1: none), and the largest classes under it."""
    counts = class_sums(labels, len(names))[0]
    size = _width(image, height), height
    few = cv2.resize(labels.astype(np.int32), size, interpolation=cv2.INTER_NEAREST_EXACT)
    picture = overlay(np.asarray(shown(image, height=height)), few, names, legend=False, blend=BLEND)
    present = sorted((c for c in range(len(names)) if counts[c]), key=lambda c: -counts[c])
    colours = palette(len(names))
    lines: list[tuple[Colour | None, str]] = []
    for c in present[:most]:
        red, green, blue = map(int, colours[c])
        lines.append(((red, green, blue), f"{names[c]} {100 * counts[c] / labels.size:.0f} %"))
    if len(present) > most:
        lines.append((None, f"and {len(present) - most} more"))
    if len(present) == 0 or counts.sum() < labels.size:
        lines.append((None, f"unlabelled {100 * (1 - counts.sum() / labels.size):.0f} %"))
    return Panel(title, picture, lines)


def sheet(rows: Sequence[Sequence[Panel]]) -> Image.Image:
    """Rows of panels on white, one below the other; in columns where rows are of one length."""
    columns = [[_needed(panel) for panel in row] for row in rows]
    if len(set(map(len, rows))) == 1:
        columns = [list(map(max, *columns, columns[0]))] * len(rows)
    heights = [_TITLE + max(p.picture.height + 4 + _LINE * len(p.lines) for p in row) + _GAP for row in rows]
    width = max(sum(widths) + _GAP * (len(widths) + 1) for widths in columns)
    whole = Image.new("RGB", (width, sum(heights) + _GAP), "white")
    draw, top = ImageDraw.Draw(whole), _GAP
    for row, widths, height in zip(rows, columns, heights, strict=True):
        left = _GAP
        for panel, width in zip(row, widths, strict=True):
            font, title = _fitted(panel.title, 15, width)
            draw.text((left, top + _TITLE / 2 - 2), title, fill=_INK, font=font, anchor="lm")
            whole.paste(panel.picture, (left, top + _TITLE))
            y = top + _TITLE + panel.picture.height + 4
            for colour, text in panel.lines:
                indent = 0
                if colour is not None:
                    draw.rectangle((left, y + 3, left + 11, y + 14), fill=colour, outline=_GREY)
                    indent = 17
                font, line = _fitted(text, 13, width - indent)
                draw.text((left + indent, y + _LINE / 2), line, fill=_INK, font=font, anchor="lm")
                y += _LINE
            left += width + _GAP
        top += height
    return whole


def _width(pixels: np.ndarray, height: int) -> int:
    return int(np.clip(round(height * pixels.shape[1] / pixels.shape[0]), 32, 8 * height))


def _needed(panel: Panel) -> int:
    return max(panel.picture.width, min(150, HEIGHT))


def _fitted(text: str, size: int, width: float) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, str]:
    font, text = font_for(text, size)
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    return font, text
