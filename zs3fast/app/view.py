"""Results as the page's viewer takes them: one JSON text, numbers packed, names as data and never as HTML."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from zs3fast.types import Segmentation
from zs3fast.utils.rendering import class_sums, palette

LARGEST = 1280  # pixels a side that travel to the browser
STEPS = 200  # of a score: a threshold of two decimals cuts at a whole one
_SMALL = 300_000  # pixels up to which the image travels without loss


def view(results: Sequence[tuple[str, Segmentation]]) -> str:
    """JSON of (model's name, result) pairs, all of one image and one class list.

    `image` is a data URL; for each model `map` is gzip in base64 of the labels, uint16 [H, W] (65535: unlabelled), and
    after them of the scores, uint8 [H, W] in steps of 1/200, both of the image as it travels.
    """
    first = results[0][1]
    height, width = first.labels.shape
    factor = min(1.0, LARGEST / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    rows, columns = (np.arange(n) * of // n for n, of in zip(size, (height, width), strict=True))
    colours = palette(len(first.class_names))
    content = {
        "image": _data_url(first.image, size),
        "height": size[0],
        "width": size[1],
        "names": list(first.class_names),
        "colours": ["#{:02x}{:02x}{:02x}".format(*map(int, colour)) for colour in colours],
        "models": [_model(title, result, rows, columns) for title, result in results],
    }
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _model(title: str, result: Segmentation, rows: np.ndarray, columns: np.ndarray) -> dict[str, Any]:
    labels = result.labels[np.ix_(rows, columns)].astype("<i4")
    scores = result.scores[np.ix_(rows, columns)].astype(np.float64)
    steps = np.floor(np.clip(np.nan_to_num(scores), 0, 255 / STEPS) * STEPS + 1e-6).astype(np.uint8)
    packed = gzip.compress(labels.astype("<u2").tobytes() + steps.tobytes(), 5)  # -1 wraps round to 65535
    counts, _ = class_sums(result.labels, len(result.class_names))
    shares = [round(100 * int(count) / result.labels.size, 2) for count in counts]
    return {"title": title, "map": base64.b64encode(packed).decode(), "shares": shares}


def _data_url(image: np.ndarray, size: tuple[int, int]) -> str:
    shown = Image.fromarray(image)
    if size != image.shape[:2]:
        shown = shown.resize((size[1], size[0]), Image.Resampling.BILINEAR, reducing_gap=2.0)
    kind = "PNG" if size[0] * size[1] <= _SMALL else "JPEG"
    buffer = io.BytesIO()
    shown.save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
