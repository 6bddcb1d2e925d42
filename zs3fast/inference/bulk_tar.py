"""WebDataset shards: where the image of every sample lies in a tar, so that a run reads just the images it lacks.

A sample is what shares a key, the path up to the first dot of the file's name: `a/01.jpg` and `a/01.json` are `a/01`.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_ABOUT = re.compile(r"(?:.*/)?__[^/]*__", re.DOTALL)  # a key of what is about the shard, by convention
_BLOCK = 512  # bytes of a tar's header; zeros in its place are the end
_PADDING = 1 << 16  # bytes behind the end that are looked at: another tar may be there


@dataclass(frozen=True)
class Sample:
    """A sample's image: bytes `start` to `end` of the tar; or why there is none."""

    start: int = 0
    end: int = 0
    problem: str | None = None


def samples(file: IO[bytes], suffixes: Sequence[str]) -> list[tuple[str, Sample]]:
    """(key, image) of every sample, in order; a key that comes again with the same kind of image comes twice.

    The image is the file whose whole ending is an image's (01.jpg); without one, that whose last is (01.camera.jpg).

    Raises:
        ValueError: two images in a sample.
        tarfile.TarError: no tar, a compressed one, one that is damaged or cut off, two that were joined.
    """
    places: dict[str, Sample] = {}
    images: dict[str, list[tuple[str, Sample]]] = {}
    others: dict[str, list[str]] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            place = _place(member, places)
            found = _KEY.fullmatch(member.name)
            if place is None or found is None or _ABOUT.fullmatch(found[1]):
                continue
            key, ending = found[1], found[2].lower()
            if f".{ending}".endswith(tuple(suffixes)):
                images.setdefault(key, []).append((ending, place))
            images.setdefault(key, [])
            others.setdefault(key, []).append(ending)
        file.seek(tar.offset)  # where the header lies that ended the loop: tarfile takes a damaged one for the end
        rest = file.read(_PADDING)
    if len(rest) < _BLOCK or any(rest):
        raise tarfile.ReadError("no end mark" if len(rest) < _BLOCK else f"no header and no end at byte {tar.offset}")
    return [
        (key, one)
        for key, of_key in images.items()
        for one in _images_of(key, of_key, suffixes) or [Sample(problem=f"no image among {', '.join(others[key])}")]
    ]


def _place(member: tarfile.TarInfo, places: dict[str, Sample]) -> Sample | None:
    """Where a file's content lies; None for what is no file."""
    if member.islnk():  # a file's second name
        return places.get(member.linkname) or Sample(problem=f"a link to {member.linkname}, which is not there")
    if member.issym():
        return Sample(problem=f"a symbolic link to {member.linkname}")
    if member.issparse():
        return Sample(problem="stored as a sparse file")
    if not member.isreg():
        return None
    places[member.name] = Sample(member.offset_data, member.offset_data + member.size)
    return places[member.name]


def _images_of(key: str, found: list[tuple[str, Sample]], suffixes: Sequence[str]) -> list[Sample]:
    whole = [(ending, place) for ending, place in found if f".{ending}" in suffixes] or found
    kinds = sorted({ending for ending, _ in whole})
    if len(kinds) > 1:
        raise ValueError(f"expected one image in a sample, got {' and '.join(kinds[:2])} in {key!r}")
    return [place for _, place in whole]
