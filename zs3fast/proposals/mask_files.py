"""Masks that lie in files: one .npz, or a folder of .png masks, a picture."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zs3fast.proposals.frames import check_pictures
from zs3fast.proposals.masks import from_masks
from zs3fast.types import Proposals


def mask_files(path: str | os.PathLike[str], **frame: Any) -> Proposals:
    """The proposals of one picture (B = 1), read from files.

    - `x.npz`: `masks` [Nq, H, W] (bool, 0/1 or floats in [0, 1]); optionally `quality` [Nq], `class_scores` [Nq, K + 1]
      and `class_names` [K].
    - a folder of PNG files: one mask a file in the order of their names, every pixel that is not 0 inside.
    - `x.png`: a map of region numbers, one mask for each number that is not 0.

    Masks have the picture's own size.

    Args:
        frame: short_side, long_side and divisor as for `from_masks`.
    Raises:
        FileNotFoundError: no such file. ValueError: a file that cannot be read, or with other arrays, naming it.
    """
    path = Path(path)
    content = _read(path)
    try:
        return from_masks(**content, **frame)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from None


class FileMaskProposer:
    """A proposer that reads what lies on disk: the masks of one picture, or a folder with those of many.

    Args:
        path: what `mask_files` reads, for one picture; or a folder in which a picture `street.jpg` has its masks in
            `street.npz`, `street.png` or a folder `street`.
        frame: short_side, long_side and divisor as for `from_masks`.
    """

    def __init__(self, path: str | os.PathLike[str], **frame: Any) -> None:
        self.path = Path(path)
        self.frame = frame
        if not self.path.exists():
            raise FileNotFoundError(f"masks: no file or folder {self.path}")

    def __call__(self, pictures: Sequence[np.ndarray], names: Sequence[str] | None = None) -> Proposals:
        """Proposals of the pictures, whose sizes must be those of their masks.

        Args:
            names: file names of the pictures, to find their masks by; None where `path` is for one picture.
        """
        check_pictures(pictures)
        if names is not None and len(names) != len(pictures):
            raise ValueError(f"names: expected {len(pictures)}, one a picture, got {len(names)}")
        if len(pictures) > 1 and (names is None or not self.path.is_dir()):
            raise ValueError(
                f"pictures: {len(pictures)} of them need a folder of masks and the pictures' file names, got the path "
                f"{self.path} and {'no names' if names is None else 'names'}"
            )
        contents = [_read(self._file_of(name)) for name in names or [None]]
        if len({content.get("class_names") for content in contents}) != 1:
            raise ValueError(f"masks: the files under {self.path} have different class_names")
        joined: dict[str, Any] = {}
        for key in ("masks", "class_scores", "quality"):
            given = [content[key][0] for content in contents if key in content]
            if given and len(given) != len(contents):
                raise ValueError(f"masks: only some of the files under {self.path} have {key}")
            if given:
                joined[key] = given
        sizes = [picture.shape[:2] for picture in pictures]
        try:
            return from_masks(**joined, class_names=contents[0].get("class_names"), original_sizes=sizes, **self.frame)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{self.path}: {error}") from None

    def _file_of(self, name: str | None) -> Path:
        stem = None if name is None else Path(name).stem
        if stem is None or not self.path.is_dir():
            return self.path
        candidates = [self.path / f"{stem}.npz", self.path / f"{stem}.png", self.path / stem]
        for candidate in candidates:
            if candidate.exists():
                return candidate
        if self.path.name == stem:
            return self.path
        raise FileNotFoundError(f"masks: for the picture {name}, none of {', '.join(map(str, candidates))} exists")


def _read(path: Path) -> dict[str, Any]:
    """Arguments of `from_masks`, each a list of one picture's."""
    if not path.exists():
        raise FileNotFoundError(f"masks: no file or folder {path}")
    if path.is_dir():
        files = sorted(path.glob("*.png"))
        if not files:
            raise ValueError(f"masks: the folder {path} holds no .png file")
        masks = [_read_png(file) != 0 for file in files]
        for file, mask in zip(files, masks):
            if mask.shape != masks[0].shape:
                raise ValueError(f"masks: {file} is {mask.shape}, {files[0].name} is {masks[0].shape}")
        return {"masks": [np.stack(masks)]}
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".png":
        regions = _read_png(path)
        values = [value for value in np.unique(regions) if value != 0]
        return {
            "masks": [np.stack([regions == value for value in values]) if values else np.zeros((0, *regions.shape))]
        }
    raise ValueError(f"masks: expected a .npz file, a .png file or a folder of .png files, got {path}")


def _read_npz(path: Path) -> dict[str, Any]:
    known = ("masks", "quality", "class_scores", "class_names")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"masks: {path} is not a readable .npz file of plain arrays ({error})") from None
    if "masks" not in arrays or set(arrays) - set(known):
        raise ValueError(f"masks: {path} holds {sorted(arrays)}, expected `masks` and perhaps {', '.join(known[1:])}")
    content: dict[str, Any] = {name: [arrays[name]] for name in known[:3] if name in arrays}
    if "class_names" in arrays:
        content["class_names"] = tuple(str(name) for name in arrays["class_names"])
    return content


def _read_png(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            array = np.asarray(image.convert("L") if image.mode in ("1", "LA", "RGB", "RGBA") else image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"masks: {path} is not a readable picture ({error})") from None
    if array.ndim != 2:
        raise ValueError(f"masks: {path} has {array.shape[2]} channels, expected one")
    return array
