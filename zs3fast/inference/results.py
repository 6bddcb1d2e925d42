"""Images in and results out as files: what a command line names, and what is written for each image."""

from __future__ import annotations

import glob
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from zs3fast.utils.console import stderr

if TYPE_CHECKING:
    from zs3fast.types import Segmentation

OUTPUT_SUFFIXES = ("_labels.png", "_overlay.png")  # of our own files, when a folder is read a second time


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Files as given, the images of folders, what globs match; each once, in order."""
    from zs3fast.utils.images import image_files

    found: dict[Path, None] = {}
    for text in inputs:
        if not text:  # Path("") is this folder
            raise ValueError("INPUT: expected images, folders or globs, got an empty name")
        path = Path(text)
        if path.is_dir():
            matches, unread = image_files(path.iterdir())
        elif path.exists() or not glob.has_magic(text):
            matches, unread = [path], []  # a file that is not there is reported with the other failures
        else:
            matches, unread = image_files(Path(match) for match in glob.glob(text, recursive=True))
        matches = [match for match in matches if match == path or not match.name.endswith(OUTPUT_SUFFIXES)]
        left_out = _left_out(unread)
        if not matches:
            raise ValueError(f"INPUT: no images in {text}{f'; {left_out}' if left_out else ''}")
        if left_out:
            stderr.print(f"[yellow]note[/] {escape(text)}: {escape(left_out)}")
        found.update(dict.fromkeys(matches))
    return list(found)


def _left_out(unread: list[Path]) -> str:
    if not unread:
        return ""
    suffixes = ", ".join(sorted({path.suffix.lower() for path in unread}))
    which = unread[0].name if len(unread) == 1 else f"{len(unread)} files, such as {unread[0].name}, are"
    return f"{which}{' is' if len(unread) == 1 else ''} left out, as Pillow does not read {suffixes}"


def distinct_stems(images: Sequence[Path]) -> dict[Path, str]:
    """Names of the results: the image's stem, with a number where another image has it (on any file system)."""
    natural = {result_stem(image).casefold() for image in images}
    used: set[str] = set()
    stems = {}
    for image in images:
        stem, number = result_stem(image), 1
        while stem.casefold() in used or (number > 1 and stem.casefold() in natural):
            number += 1
            stem = result_stem(image, f"-{number}")
        used.add(stem.casefold())
        stems[image] = stem
        if number > 1:
            stderr.print(f"[yellow]note[/] {escape(str(image))}: results are named {escape(stem)}, its own is taken")
    return stems


def result_stem(image: Path, end: str = "") -> str:
    """What the names of an image's results begin with: its stem (never "." or "..", nor hidden), as long as fits."""
    stem = image.stem.lstrip(".") or "picture"
    while len(os.fsencode(stem + end)) + max(map(len, OUTPUT_SUFFIXES)) > 255:  # bytes are what is counted
        stem = stem[:-1]
    return stem + end


def write_result(result: Segmentation, target: Path, *, legend: bool = True, blend: float = 0.6) -> Path:
    """Write an image's three files, TARGET_labels.png, TARGET_overlay.png and TARGET.json; the overlay's path.

    legend, blend: of the overlay, see `Segmentation.overlay`.
    """
    from zs3fast.utils.files import replacing
    from zs3fast.utils.rendering import save_overlay

    labels, overlay, summary = (target.parent / f"{target.name}{end}" for end in (*OUTPUT_SUFFIXES, ".json"))
    result.save(labels)
    save_overlay(result.image, result.labels, result.class_names, overlay, legend=legend, blend=blend)
    content = {**result.to_dict(), "labels": labels.name, "overlay": overlay.name}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if any("\ud800" <= character <= "\udfff" for character in text):  # a file name that is not UTF-8
        text = json.dumps(content, indent=1) + "\n"
    with replacing(summary) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return overlay


@contextmanager
def warnings_by_image() -> Iterator[None]:
    """Within the block, warnings of any thread are a line each, with the image they are about."""
    from zs3fast.inference.streaming import current_item

    def show(message: Warning | str, *_: object, **__: object) -> None:
        image = current_item()
        whose = "" if image is None else f" {escape(str(image))}:"
        stderr.print(f"[yellow]warning[/]{whose} {escape(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def in_words(result: Segmentation) -> str:
    """What a result shows, largest first, in a line."""
    classes = sorted(result.to_dict()["classes"], key=lambda entry: -entry["pixels"])
    present = [f"{entry['name']} {entry['percent']:.0f} %" for entry in classes if entry["pixels"]]
    more = f", and {len(present) - 4} more" if len(present) > 4 else ""
    return ", ".join(present[:4]) + more or "nothing labelled"
