"""Masks that lie in files: one .npz, or a folder of .png masks, an image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zs3fast.proposals.frames import check_images, frame_size
from zs3fast.proposals.masks import from_masks
from zs3fast.types import Proposals
from zs3fast.utils.arrays import read_npz
from zs3fast.utils.errors import FileFormatError
from zs3fast.utils.files import hidden
from zs3fast.utils.images import read_mask_file
from zs3fast.utils.limits import check_unpacked


def mask_files(path: str | os.PathLike[str], **frame: Any) -> Proposals:
    """The proposals of one image (B = 1), read from files.

    - `x.npz`: `masks` [Nq, H, W] (bool, 0/1 or floats in [0, 1]); optionally `quality` [Nq], `class_scores` [Nq, K + 1]
      and `class_names` [K].
    - a folder of PNG files: one mask a file in the order of their names, every pixel that is not 0 inside.
    - `x.png`: a map of region numbers, one mask for each number that is not 0.

    Masks have the image's own size.

    Args:
        frame: short_side, long_side and divisor as for `from_masks`.
    Raises:
        FileNotFoundError: no such file. ValueError: a file that cannot be read, or with other arrays, naming it.
    """
    path = Path(path)
    return _on_frame(path, _read(path), frame)


class FileMaskProposer:
    """A proposer that reads what lies on disk: the masks of one image, or a folder with those of many.

    Args:
        path: what `mask_files` reads, for one image; or a folder in which an image `street.jpg` has its masks in
            `street.npz`, `street.png` or a folder `street`.
        frame: short_side, long_side and divisor as for `from_masks`.
    """

    def __init__(self, path: str | os.PathLike[str], **frame: Any) -> None:
        self.path = Path(path)
        self.frame = frame
        if not self.path.exists():
            raise FileNotFoundError(f"masks: no file or folder {self.path}")

    def __call__(self, pictures: Sequence[np.ndarray], names: Sequence[str] | None = None) -> Proposals:
        """Proposals of the images, whose sizes must be those of their masks.

        Args:
            names: file names of the images, to find their masks by; None where `path` is for one image.
        """
        check_images(pictures)
        if names is not None and len(names) != len(pictures):
            raise ValueError(f"names: expected {len(pictures)}, one an image, got {len(names)}")
        if len(pictures) > 1 and (names is None or not self.path.is_dir()):
            raise ValueError(
                f"pictures: {len(pictures)} of them need a folder of masks and the pictures' file names, got the path "
                f"{self.path} and {'no names' if names is None else 'names'}"
            )
        asked: Sequence[str | None] = names or [None]
        contents = [_read(self._file_of(name)) for name in asked]
        if len({content.get("class_names") for content in contents}) != 1:
            raise ValueError(f"masks: expected the same class_names in all files under {self.path}, got different ones")
        joined: dict[str, Any] = {}
        for key in ("masks", "class_scores", "quality"):
            given = [content[key][0] for content in contents if key in content]
            if given and len(given) != len(contents):
                raise ValueError(f"masks: expected {key} in all or none of the files under {self.path}, got it in some")
            if given:
                joined[key] = given
        if "class_names" in contents[0]:
            joined["class_names"] = contents[0]["class_names"]
        joined["original_sizes"] = [image.shape[:2] for image in pictures]
        return _on_frame(self.path, joined, self.frame)

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
        raise FileNotFoundError(f"masks: for the image {name}, none of {', '.join(map(str, candidates))} exists")


def _on_frame(path: Path, content: dict[str, Any], frame: dict[str, Any]) -> Proposals:
    """The masks of one or several images on their frame; errors name the file or folder."""
    most = max(len(masks) for masks in content["masks"])
    sides = {key: frame[key] for key in ("short_side", "long_side") if key in frame}
    sizes = [frame_size(masks.shape[1:], **sides) for masks in content["masks"] if 0 not in masks.shape[1:]]
    height, width = (max((size[axis] for size in sizes), default=0) for axis in (0, 1))
    needed = len(content["masks"]) * most * height * width * 4
    check_unpacked(needed, f"masks: {path}", f"{most} masks of {height} x {width}")
    try:
        return from_masks(**content, **frame)
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"{path}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    """Arguments of `from_masks`, each a list of one image's."""
    if not path.exists():
        raise FileNotFoundError(f"masks: no file or folder {path}")
    if path.is_dir():
        return {"masks": [_read_folder(path)]}
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".png":
        regions, _ = read_mask_file(path, "masks", grey=True)
        values = [value for value in np.unique(regions) if value != 0]
        check_unpacked(len(values) * regions.size, f"masks: {path}", f"{len(values)} masks of {_size(regions)}")
        masks = np.zeros((len(values), *regions.shape), bool)
        for mask, value in zip(masks, values):
            np.equal(regions, value, out=mask)
        return {"masks": [masks]}
    raise ValueError(f"masks: expected a .npz file, a .png file or a folder of .png files, got {path}")


def _read_folder(path: Path) -> np.ndarray:
    files = sorted(file for file in path.glob("*.png") if not hidden(file.name))
    if not files:
        raise ValueError(f"masks: the folder {path} holds no .png file")
    masks: np.ndarray | None = None
    for index, file in enumerate(files):
        mask = read_mask_file(file, "masks", grey=True)[0] != 0
        if masks is None:
            check_unpacked(len(files) * mask.size, f"masks: {path}", f"{len(files)} masks of {_size(mask)}")
            masks = np.zeros((len(files), *mask.shape), bool)
        if mask.shape != masks.shape[1:]:
            raise ValueError(f"masks: {file}: expected {masks.shape[1:]}, as {files[0].name}, got {mask.shape}")
        masks[index] = mask
    assert masks is not None
    return masks


def _read_npz(path: Path) -> dict[str, Any]:
    known = ("masks", "quality", "class_scores", "class_names")
    arrays = read_npz(path, "masks")
    if "masks" not in arrays or set(arrays) - set(known):
        raise ValueError(f"masks: {path}: expected `masks` and perhaps {', '.join(known[1:])}, got {sorted(arrays)}")
    content: dict[str, Any] = {name: [arrays[name]] for name in known[:3] if name in arrays}
    odd = next((name for name in content if content[name][0].dtype.kind not in "biuf"), None)
    if odd is not None:
        raise FileFormatError(f"masks: {path}: expected numbers as {odd}, got {content[odd][0].dtype}")
    if arrays["masks"].ndim != 3:
        raise FileFormatError(f"masks: {path}: expected masks [Nq, H, W], got {list(arrays['masks'].shape)}")
    if "class_names" in arrays:
        names = arrays["class_names"]
        if names.ndim != 1 or names.dtype.kind not in "US":
            raise FileFormatError(
                f"masks: {path}: expected K names as class_names, got {names.dtype} {list(names.shape)}"
            )
        words = names.tolist()
        content["class_names"] = tuple(w.decode("utf-8", "replace") if isinstance(w, bytes) else w for w in words)
    return content


def _size(array: np.ndarray) -> str:
    return " x ".join(map(str, array.shape))
