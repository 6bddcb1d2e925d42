"""Ground-truth boxes that lie in JSON files: a simple format of our own, and COCO's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from zs3fast.proposals.boxes import make_boxes
from zs3fast.proposals.frames import check_image
from zs3fast.types import BoxProposals
from zs3fast.utils.errors import FileFormatError
from zs3fast.utils.text_files import read_json


def box_file(
    path: str | os.PathLike[str], name: str | None = None, image_size: tuple[int, int] | None = None
) -> BoxProposals:
    """The boxes of one image in a JSON file; see `FileBoxProposer` for the formats and for many images.

    Args:
        name: the image's file name; may be left out where the file is about one image.
        image_size: (H, W) of the image, where the file does not say it; where it does, both must agree.
    """
    return FileBoxProposer(path).boxes(name, image_size)


class FileBoxProposer:
    """A proposer that reads boxes from a JSON file, once, and gives each image its own.

    Either the simple format, boxes x0 y0 x1 y1 in pixels (x1, y1 just past the last pixel), `score` 1 unless given:

        {"vocabulary": ["dog", "cat"],                                                        (optional)
         "pictures": [{"file_name": "street.jpg", "width": 640, "height": 480,                (sizes optional)
                       "boxes": [{"box": [12, 30, 200, 310], "name": "dog", "score": 0.9}]}]}

    or COCO's, with `images`, `annotations` (`bbox` = x y width height) and `categories`, crowds included. Boxes without
    area, which COCO's own files hold, are left out there with a warning; in the simple format they are an error.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        content = read_json(self.path, "boxes")
        readers: dict[str, Callable[[dict[str, Any]], None]] = {"pictures": self._simple, "annotations": self._coco}
        key = next((key for key in readers if isinstance(content, dict) and isinstance(content.get(key), list)), None)
        if key is None:
            raise ValueError(f"boxes: {self.path} has neither a list `pictures` nor COCO's `annotations`")
        self._images: dict[str, dict[str, Any]] = {}
        self.vocabulary: tuple[str, ...] = ()
        try:
            readers[key](content)
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"boxes: {self.path} is not in a known format, an entry lacks or misnames {error}; see FileBoxProposer"
            ) from None
        except (OverflowError, ValueError) as error:
            reason = str(error).removeprefix(f"boxes: {self.path}").lstrip(": ")
            raise FileFormatError(f"boxes: {self.path}: {reason}") from None
        self.file_names = tuple(self._images)

    def __call__(self, picture: np.ndarray, name: str | None = None) -> BoxProposals:
        """The boxes of an image; a size other than the file's is an error."""
        check_image(picture)
        return self.boxes(name, picture.shape[:2])

    def boxes(self, name: str | None = None, image_size: tuple[int, int] | None = None) -> BoxProposals:
        """The boxes of one image, by its file name; folders in the names do not matter where the rest is unique."""
        name = self._find(name)
        entry = self._images[name]
        size = entry["size"] or image_size
        if size is None:
            raise ValueError(f"image_size: expected (H, W), as {self.path} does not say the size of {name}, got None")
        if image_size is not None and tuple(image_size) != tuple(size):
            raise ValueError(f"image_size: expected {tuple(size)}, as {self.path} says of {name}, got {image_size}")
        try:
            return make_boxes(entry["boxes"], entry["names"], size, scores=entry["scores"], vocabulary=self.vocabulary)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}, {name}: {error}") from None

    def _find(self, name: str | None) -> str:
        if name is None:
            if len(self._images) == 1:
                return next(iter(self._images))
            raise ValueError(
                f"name: expected a file name, as {self.path} is about {len(self._images)} images, got None"
            )
        if name in self._images:
            return name
        matches = [key for key in self._images if Path(key).name == Path(name).name]
        if len(matches) != 1:
            few = ", ".join(list(self._images)[:3])
            raise ValueError(f"name: {self.path} has {len(matches)} images named {Path(name).name!r}; it has {few} ...")
        return matches[0]

    def _simple(self, content: dict[str, Any]) -> None:
        for image in content["pictures"]:
            boxes = image["boxes"]
            sides = (image.get("height"), image.get("width"))
            self._add(
                image["file_name"],
                size=None if None in sides else (_side(sides[0]), _side(sides[1])),
                boxes=[box["box"] for box in boxes],
                names=[str(box["name"]) for box in boxes],
                scores=[box.get("score", 1.0) for box in boxes],
            )
        used = [name for entry in self._images.values() for name in entry["names"]]
        self.vocabulary = tuple(content.get("vocabulary") or dict.fromkeys(used))

    def _coco(self, content: dict[str, Any]) -> None:
        words = {category["id"]: str(category["name"]) for category in content["categories"]}
        self.vocabulary = tuple(words.values())
        names = {}
        for image in content["images"]:
            names[image["id"]] = image["file_name"]
            size = (_side(image["height"]), _side(image["width"]))
            self._add(image["file_name"], size=size, boxes=[], names=[], scores=[])
        flat = 0
        for annotation in content["annotations"]:
            entry = self._images[names[annotation["image_id"]]]
            if len(annotation["bbox"]) != 4:
                raise ValueError(f"boxes: {self.path}: expected bbox x y width height, got {annotation['bbox']}")
            x, y, width, height = annotation["bbox"]
            if not (width > 0 and height > 0):
                flat += 1
                continue
            entry["boxes"].append([x, y, x + width, y + height])
            entry["names"].append(words[annotation["category_id"]])
            entry["scores"].append(annotation.get("score", 1.0))
        if flat:
            warnings.warn(f"boxes: {self.path} has {flat} boxes without area, left out", stacklevel=4)

    def _add(self, name: str, **entry: Any) -> None:
        if name in self._images:
            raise ValueError(f"boxes: {self.path}: expected each image once, got {name!r} twice")
        self._images[name] = entry


def _side(value: Any) -> int:
    """A height or width of an image; JSON's numbers may be anything, also infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or not 1 <= value <= 2**31:
        raise ValueError(f"expected a height and a width of at least 1, got {value!r:.80}")
    return int(value)
