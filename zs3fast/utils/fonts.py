"""Fonts that can write a name: Pillow's own, else one of the machine's, else the letters' numbers."""

from __future__ import annotations

import functools
import os
import sys
import unicodedata
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

_NO_CHARACTER = "\U0010ffff"  # a code point that is none, for the glyph a font shows for what it lacks
_MOST_FONTS = 2000  # files that are looked at
# Families that cover much, tried first; after them whatever is there, sans before serif.
_PREFERRED = (
    "notosans-regular",
    "dejavusans.",
    "notosanscjk",
    "arialuni",
    "arial unicode",
    "unifont",
    "wqy",
    "droidsans",
)


def font_for(name: str, size: int) -> tuple[Font, str]:
    """A font and the text to write with it, so that names that differ look different.

    Characters that no font of the machine has are written as numbers: "U+732B".
    """
    text = unicodedata.normalize("NFC", name)
    for path in (None, *_fonts()):
        if all(_shows(path, character) for character in text):
            return _load(path, size), text
    spelt = "".join(c if _shows(None, c) else f"U+{ord(c):04X}" for c in text)
    return _load(None, size), spelt


@functools.lru_cache(maxsize=64)
def _load(path: str | None, size: int) -> Font:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@functools.lru_cache(maxsize=65536)
def _shows(path: str | None, character: str) -> bool:
    """Whether a font has a glyph of its own for a character."""
    if character.isspace():
        return True
    glyph, lacking = (_glyph(path, one) for one in (character, _NO_CHARACTER))
    return glyph is not None and glyph != lacking


def _glyph(path: str | None, character: str) -> tuple[tuple[int, int], bytes] | None:
    try:
        mask = _load(path, 20).getmask(character)
    except (OSError, ValueError):  # no font, or one without outlines at this size
        return None
    return mask.size, bytes(mask)


@functools.cache
def _fonts() -> tuple[str, ...]:
    """The machine's fonts, the likeliest to cover a name first."""
    found: list[str] = []
    for folder in _folders():
        for root, _, names in os.walk(folder):
            found += [os.path.join(root, name) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]
            if len(found) >= _MOST_FONTS:
                break

    def order(path: str) -> tuple[int, bool, bool, str]:
        name = os.path.basename(path).lower()
        rank = next((i for i, family in enumerate(_PREFERRED) if family in name), len(_PREFERRED))
        styled = any(style in name for style in ("bold", "italic", "oblique", "light", "thin", "black", "condensed"))
        return rank, styled, "serif" in name and "sans" not in name, path

    return tuple(sorted(found, key=order))


def _folders() -> list[Path]:
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    if sys.platform == "win32":
        return [Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts"]
    data = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [*(Path(one) / "fonts" for one in data.split(":")), home / ".local/share/fonts", home / ".fonts"]
