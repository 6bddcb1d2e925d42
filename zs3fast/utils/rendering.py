"""Label maps as images: class colours, the overlay with its legend, label files."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zs3fast.utils.files import replacing
from zs3fast.utils.fonts import Font, font_for
from zs3fast.utils.images import strips
from zs3fast.utils.png import write_png

UNLABELLED = -1
BLEND = 0.6  # how much of a class colour covers the photo
_SMALLEST_SIDE = 200  # smaller photos are enlarged, by a whole factor, so that they can be seen


@functools.cache
def palette(count: int) -> np.ndarray:
    """Colours [count, 3] uint8, each as far as possible (in CIELAB) from white, black, mid-grey and those before it.

    A class index has the same colour in every image, however many classes there are.
    """
    steps = np.linspace(0, 255, 16)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lab = cielab(candidates)
    visible = (lab[:, 0] > 35) & (lab[:, 0] < 92)  # neither lost in shadows nor in the legend's white
    candidates, lab = candidates[visible], lab[visible]
    taken = cielab(np.array([[255.0] * 3, [0.0] * 3, [127.0] * 3]))
    distance = np.min(np.linalg.norm(lab[:, None] - taken, axis=-1), axis=1)
    chosen = []
    for _ in range(count):
        best = int(np.argmax(distance))
        chosen.append(best)
        distance = np.minimum(distance, np.linalg.norm(lab - lab[best], axis=-1))
    colours = candidates[chosen].round().astype(np.uint8).reshape(count, 3)
    colours.flags.writeable = False
    return colours


def overlay(
    image: np.ndarray, labels: np.ndarray, class_names: Sequence[str], *, legend: bool = True, blend: float = BLEND
) -> Image.Image:
    """The photo under its class colours, with a legend beside it.

    Args:
        image: [H, W, 3] uint8.  labels: [H, W] class indices, -1 where unlabelled (the photo shows through).
        legend: the classes present, largest first: colour, name, share of all pixels. Photos smaller than 200 pixels a
            side are enlarged for it. False: the photo alone, at its size.
        blend: how much of a class's colour covers the photo, 0..1.
    Returns:
        RGB image.
    """
    size, drawn = _overlay(image, labels, class_names, legend, blend)
    whole, top = Image.new("RGB", size), 0
    for strip in drawn:
        whole.paste(Image.fromarray(strip), (0, top))
        top += len(strip)
    return whole


def save_overlay(
    image: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    *,
    legend: bool = True,
    blend: float = BLEND,
) -> None:
    """Write `overlay` as a PNG strip by strip, in no more memory than a few of them; whole, or not at all."""
    size, drawn = _overlay(image, labels, class_names, legend, blend)
    with replacing(path) as temporary:
        write_png(temporary, size, drawn)


def _overlay(
    image: np.ndarray, labels: np.ndarray, class_names: Sequence[str], legend: bool, blend: float
) -> tuple[tuple[int, int], Iterator[np.ndarray]]:
    """Width and height of the overlay, and its rows from the top, uint8 [some, width, 3]."""
    if not 0 <= blend <= 1:
        raise ValueError(f"blend: expected a share in 0..1, got {blend}")
    height, width = labels.shape
    factor = max(1, -(-_SMALLEST_SIDE // max(height, width))) if legend else 1
    tall = height * factor
    size = (width * factor, tall)
    beside = np.empty((0, 0, 3), np.uint8)
    if legend:
        beside = np.asarray(_legend(_rows(labels, class_names), size))
    colours = palette(len(class_names)).astype(np.float32)

    def drawn() -> Iterator[np.ndarray]:
        for rows in strips(height, width):
            strip, few = image[rows].astype(np.float32), labels[rows]
            labelled = few != UNLABELLED
            strip[labelled] = (1 - blend) * strip[labelled] + blend * colours[few[labelled]]
            blended = strip.round().astype(np.uint8).repeat(factor, 0).repeat(factor, 1)
            yield _joined(blended, beside[rows.start * factor : rows.stop * factor], beside.shape[1])
        if len(beside) > tall:
            yield _joined(np.full((len(beside) - tall, size[0], 3), 255, np.uint8), beside[tall:], beside.shape[1])

    return (size[0] + beside.shape[1], max(tall, len(beside))), drawn()


def _joined(left: np.ndarray, right: np.ndarray, width: int) -> np.ndarray:
    """Rows side by side; where there are none on the right they are white, `width` wide."""
    filled = np.full((len(left), width, 3), 255, np.uint8)
    filled[: len(right)] = right
    return np.concatenate([left, filled], 1) if width else left


def save_labels(labels: np.ndarray, path: str | os.PathLike[str], count: int) -> None:
    """Write labels [H, W] as a PNG of class indices; the file is replaced whole, or not at all.

    Up to 255 classes: 8 bits with a palette, 255 = unlabelled. More: 16-bit grey, 65535 = unlabelled.
    """
    if not os.fspath(path).lower().endswith(".png"):
        raise ValueError(f"path: expected a .png file for a label map, got {os.fspath(path)!r}")
    if count > 65535:
        raise ValueError(f"labels: expected at most 65535 classes, which a PNG holds, got {count}")
    colours: np.ndarray | None = None
    if count <= 255:
        colours = np.full((256, 3), 255, np.uint8)
        colours[:count] = palette(count)
        kind: np.dtype[np.unsignedinteger] = np.dtype(np.uint8)  # -1 wraps round to 255
    else:
        kind = np.dtype(np.uint16)  # or to 65535
    height, width = labels.shape
    with replacing(path) as temporary:
        write_png(temporary, (width, height), (labels[rows].astype(kind) for rows in strips(height, width)), colours)


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PIL image in the format of the suffix; the file is replaced whole, or not at all."""
    with replacing(path) as temporary:
        image.save(temporary, compress_level=1)  # of PNG: a third of the time for a tenth more bytes


def class_sums(labels: np.ndarray, count: int, scores: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of every class, int64 [C], and the sum of their scores, float64 [C], of labels [H, W], -1: of none."""
    pixels, sums = np.zeros(count, np.int64), np.zeros(count)
    for rows in strips(*labels.shape):
        few = labels[rows].ravel().astype(np.int64) + 1
        pixels += np.bincount(few, minlength=count + 1)[1:]
        if scores is not None:
            sums += np.bincount(few, scores[rows].ravel(), count + 1)[1:]
    return pixels, sums


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = map(int, colour)
    return red, green, blue


def _rows(labels: np.ndarray, class_names: Sequence[str]) -> list[tuple[tuple[int, int, int] | None, str, str]]:
    """(colour, name, share) of what is present, largest first; unlabelled pixels last, without a colour."""
    counts = class_sums(labels, len(class_names))[0]
    colours = palette(len(class_names))
    present = sorted((c for c in range(len(class_names)) if counts[c]), key=lambda c: -counts[c])
    rows: list[tuple[tuple[int, int, int] | None, str, str]]
    rows = [(_rgb(colours[c]), class_names[c], _share(counts[c], labels.size)) for c in present]
    unlabelled = labels.size - int(counts.sum())
    return rows + ([(None, "unlabelled", _share(unlabelled, labels.size))] if unlabelled else [])


def _share(pixels: int, total: int) -> str:
    percent = 100 * pixels / total
    return "<0.1 %" if percent < 0.1 else f"{percent:.1f} %"


def _legend(rows: list[tuple[tuple[int, int, int] | None, str, str]], beside: tuple[int, int]) -> Image.Image:
    """The legend on white, in as many columns as fit it beside an image of that size."""
    size = int(np.clip(min(beside) / 22, 14, 64))  # readable when the whole image is shown on a screen
    font = ImageFont.load_default(size)  # of numbers
    names = [_shortened(*font_for(name, size), 16 * size) for _, name, _ in rows]
    line, gap = round(1.5 * size), round(0.5 * size)
    name_width = round(max(of.getlength(name) for of, name in names))
    share_width = round(max(font.getlength(share) for _, _, share in rows))
    column = gap + size + gap + name_width + gap + share_width + size
    per_column = max(min(len(rows), 10), (beside[1] - 2 * gap) // line)
    columns = -(-len(rows) // per_column)
    legend = Image.new("RGB", (columns * column, min(len(rows), per_column) * line + 2 * gap), "white")
    draw = ImageDraw.Draw(legend)
    for index, ((colour, _, share), (of, name)) in enumerate(zip(rows, names, strict=True)):
        x, y = index // per_column * column + gap, gap + index % per_column * line
        box = (x, y + line // 2 - size // 2, x + size - 1, y + line // 2 - size // 2 + size - 1)
        draw.rectangle(box, fill=colour or (255, 255, 255), outline=(70, 70, 70))
        draw.text((x + size + gap, y + line / 2), name, fill=(20, 20, 20), font=of, anchor="lm")
        right = x + size + 2 * gap + name_width + share_width
        draw.text((right, y + line / 2), share, fill=(90, 90, 90), font=font, anchor="rm")
    return legend


def _shortened(font: Font, name: str, width: float) -> tuple[Font, str]:
    if font.getlength(name) <= width:
        return font, name
    while name and font.getlength(name + "...") > width:
        name = name[:-1]
    return font, name + "..."


def cielab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 -> CIELAB (D65)."""
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)
