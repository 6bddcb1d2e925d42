"""One image of scenes, their truth and what methods make of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zs3fast.data.world.vocabulary import COLOURS
from zs3fast.utils.rendering import UNLABELLED, cielab, palette

# Sizes in pixels, for a sheet that is read at two thirds of its width in a README.
_SIDE, _GAP, _HEAD, _FOOT = 150, 8, 30, 24
_LINE, _ENTRIES, _SWATCH = 24, 4, 15  # of the legend: height of a line, entries in it, side of a colour
_NARROWEST = 1000  # where four entries of a legend find room
_INK, _GREY, _UNSEEN = (20, 20, 20), (95, 95, 95), (170, 60, 0)
_NOTHING = (70, 70, 70)
_LEAST = 0.01  # of an image: what is smaller in every prediction is counted in the legend, not named

Row = tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]]  # image [H, W, 3], truth [H, W], predictions [H, W] each
Entry = tuple[tuple[int, int, int] | None, str, tuple[int, int, int]]  # colour or None, words, their ink


def comparison(
    rows: Sequence[Row], names: Sequence[str], class_names: Sequence[str], unseen: Sequence[int]
) -> Image.Image:
    """A row a scene: the image, its truth, one prediction a method with its share of right pixels; a legend below.

    Classes have the colour that their name says. Regions of unseen classes have a black outline in every column, and
    their names stand in another colour. The legend holds what is there, and what methods took for it.
    """
    columns = ["image", "truth", *names]
    colours = class_colours(tuple(class_names))
    legends = [_legend_lines(truth, predictions, class_names, unseen, colours) for _, truth, predictions in rows]
    width = max(len(columns) * (_SIDE + _GAP) - _GAP, _NARROWEST)
    height = _HEAD + sum(_SIDE + _FOOT + _LINE * len(lines) + 2 * _GAP for lines in legends)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        draw.text((column * (_SIDE + _GAP) + _SIDE / 2, 6), name, fill=_INK, font=_font(17), anchor="ma")
    top = _HEAD
    for (image, truth, predictions), lines in zip(rows, legends, strict=True):
        outline = _outline(np.isin(truth, unseen), truth)
        panels = [image, *(_painted(labels, colours) for labels in (truth, *predictions))]
        for column, pixels in enumerate(panels):
            left = column * (_SIDE + _GAP)
            sheet.paste(_enlarged(pixels, outline if column else None), (left, top))
            if column > 1:
                share = f"{100 * (predictions[column - 2] == truth).mean():.0f} % right"
                draw.text((left + _SIDE / 2, top + _SIDE + 4), share, fill=_GREY, font=_font(15), anchor="ma")
        top += _SIDE + _FOOT
        for line in lines:
            _write(draw, top, width, line)
            top += _LINE
        top += 2 * _GAP
    return sheet


@functools.cache
def class_colours(names: tuple[str, ...]) -> np.ndarray:
    """Colours [C, 3] uint8: shades of the colour that a name says, of those as far apart as can be.

    A shade of red is nearer to the world's red (in CIELAB) than to any other of its colours, by half; shades of white
    have hardly a hue. A name that says no colour has one of `palette`.
    """
    colours = palette(len(names)).copy()
    steps = np.linspace(0, 255, 18)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    where = cielab(candidates)
    visible = (where[:, 0] > 30) & ((where[:, 0] > 62) | (np.abs(where[:, 1:]).max(1) > 15))
    candidates, where = candidates[visible], where[visible]
    chroma = np.linalg.norm(where[:, 1:], axis=1)
    away = np.linalg.norm(where[:, None] - cielab(np.array([*COLOURS.values()], float)), axis=-1)  # [n, colours]
    for place, word in enumerate(COLOURS):
        named = [index for index, name in enumerate(names) if word in name.split()]
        others = np.delete(away, place, axis=1).min(1)
        near = chroma < 9 if word == "white" else (away[:, place] < 0.5 * others) & (chroma > 25)
        shades = np.flatnonzero(near)
        best = int(away[shades, place].argmin())
        distance = np.full(len(shades), np.inf)
        for index in named:
            colours[index] = candidates[shades[best]].round()
            distance = np.minimum(distance, np.linalg.norm(where[shades] - where[shades[best]], axis=-1))
            best = int(distance.argmax())
    colours.flags.writeable = False
    return colours


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _painted(labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return np.where((labels == UNLABELLED)[..., None], np.uint8(_NOTHING[0]), colours[np.maximum(labels, 0)])


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
    image = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize((_SIDE, _SIDE), how)).copy()
    if nearest:
        image[outline] = 0
    image[[0, -1]] = image[:, [0, -1]] = 150  # an edge, for white on the white sheet
    return Image.fromarray(image)


def _legend_lines(
    truth: np.ndarray,
    predictions: Sequence[np.ndarray],
    class_names: Sequence[str],
    unseen: Sequence[int],
    colours: np.ndarray,
) -> list[list[Entry]]:
    """Lines of the legend: classes that are there, the largest first, then those that only predictions have."""

    def shares(labels: np.ndarray) -> np.ndarray:
        return np.bincount(labels.ravel()[labels.ravel() >= 0], minlength=len(class_names)) / labels.size

    def entry(index: int) -> Entry:
        red, green, blue = map(int, colours[index])
        name, ink = (f"{class_names[index]} (unseen)", _UNSEEN) if index in unseen else (class_names[index], _INK)
        return (red, green, blue), name, ink

    there = shares(truth)
    said = np.max([shares(labels) for labels in predictions], axis=0, initial=0.0)
    in_scene = sorted(np.flatnonzero(there).tolist(), key=lambda c: -there[c])
    wrong = sorted(np.flatnonzero((there == 0) & (said > 0)).tolist(), key=lambda c: -said[c])
    named = [c for c in wrong if said[c] >= _LEAST]
    lines = _lines([(None, "in the image:", _GREY), *map(entry, in_scene)])
    if named:
        entries: list[Entry] = [(None, "also predicted:", _GREY), *map(entry, named)]
        if len(named) < len(wrong):
            entries.append((None, f"and {len(wrong) - len(named)} under {100 * _LEAST:.0f} %", _GREY))
        lines += _lines(entries)
    if any((labels == UNLABELLED).any() for labels in (truth, *predictions)):
        lines[-1].append((_NOTHING, "unlabelled", _GREY))
    return lines


def _lines(entries: list[Entry]) -> list[list[Entry]]:
    """Each line begins with the words of the first entry, or with nothing."""
    rest = entries[1:]
    lines = [rest[i : i + _ENTRIES] for i in range(0, len(rest), _ENTRIES)]
    return [[entries[0] if not i else (None, "", _GREY), *line] for i, line in enumerate(lines)]


def _write(draw: ImageDraw.ImageDraw, top: int, width: int, line: list[Entry]) -> None:
    heading = 135
    step = (width - heading) / _ENTRIES
    for place, (colour, words, ink) in enumerate(line):
        x = heading + (place - 1) * step if place else 0.0
        if colour is not None:
            box = (x, top + (_LINE - _SWATCH) // 2, x + _SWATCH, top + (_LINE + _SWATCH) // 2)
            draw.rectangle(box, fill=colour, outline=_GREY)
            x += _SWATCH + 7
        draw.text((x, top + _LINE / 2), words, fill=ink, font=_font(15), anchor="lm")
