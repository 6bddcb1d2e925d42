"""What the page asks for: results from encoded images that are kept, so that a change of words costs no encoder."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from zs3fast.app.models import Models
from zs3fast.inference.limits import Limits
from zs3fast.inference.segmenter import EncodedImage
from zs3fast.ops.refine_maps import STEPS
from zs3fast.types import Segmentation
from zs3fast.utils.options import one_of

AS_PUBLISHED = "as published"
REFINEMENTS = {AS_PUBLISHED: None, "none": 0, "PAMR": STEPS}  # steps
KEPT = 4  # encoded images; one of 25 megapixels is 75 MB, and its features


class Desk:
    """Answers the page, one question at a time.

    Args:
        models: what there is.  limits: of what is taken.

    Attributes:
        encoded: how many images went through an encoder.
    """

    def __init__(self, models: Models, limits: Limits | None = None):
        self.models, self.limits = models, limits or Limits()
        self.encoded = 0
        self._images: OrderedDict[tuple[str, str], EncodedImage] = OrderedDict()
        self._lock = threading.Lock()

    def segment(
        self, image: bytes, classes: Any, background: bool, model: str, refinement: str = AS_PUBLISHED
    ) -> Segmentation:
        """What a model of the list says of an image file.

        Args:
            image: the file's bytes.  classes: names, as text or a list.
            background: whether the built-in list competes and stays unlabelled.  refinement: one of `REFINEMENTS`.
        Raises:
            ValueError: an image, names or a model that are no good; one line says which.
        """
        entries = self.limits.classes(classes)
        steps = REFINEMENTS[one_of("refinement", refinement, list(REFINEMENTS))]
        with self._lock:
            segmenter = self.models.get(model, steps)
            key = (hashlib.sha256(image).hexdigest(), f"{model} {steps}")
            known = self._images.get(key)
            if known is None or known.segmenter is not segmenter:  # the model may have been loaded again
                known = self._images[key] = segmenter.encode(self.limits.image(image))
                self.encoded += 1
                while len(self._images) > KEPT:
                    self._images.popitem(last=False)
            self._images.move_to_end(key)
            return segmenter(known, entries, background="auto" if background else "")


def as_shown(result: Segmentation, threshold: float, hidden: Iterable[str]) -> Segmentation:
    """The result without what the page does not show: pixels that score below `threshold`, and classes by name."""
    names = set(hidden)
    off = np.isin(result.labels, [i for i, name in enumerate(result.class_names) if name in names])
    if threshold > 0:
        off |= ~(result.scores >= threshold)
    return replace(result, labels=np.where(off, np.int32(-1), result.labels))
