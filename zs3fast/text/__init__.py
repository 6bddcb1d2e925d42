"""Class names and their embeddings: vocabularies, templates, class-name files, the text tower and its disk cache."""

from typing import TYPE_CHECKING

from zs3fast.text.cache import cache_dir
from zs3fast.text.class_files import read_class_file
from zs3fast.text.class_lists import class_names, datasets, seen_classes, unseen_classes
from zs3fast.text.competing_names import BACKGROUND_NAMES, competing_names
from zs3fast.text.embeddings import load_text_embeddings
from zs3fast.text.templates import IMAGENET, MULTI, SINGLE, TEMPLATES, resolve_templates
from zs3fast.text.vocabulary import parse_classes, whole_names

if TYPE_CHECKING:
    from zs3fast.text.encoder import TextEncoder

__all__ = [
    "BACKGROUND_NAMES",
    "IMAGENET",
    "MULTI",
    "SINGLE",
    "TEMPLATES",
    "TextEncoder",
    "cache_dir",
    "class_names",
    "competing_names",
    "datasets",
    "load_text_embeddings",
    "parse_classes",
    "read_class_file",
    "resolve_templates",
    "seen_classes",
    "unseen_classes",
    "whole_names",
]


def __getattr__(name: str) -> object:
    # The text tower brings open_clip, seconds and some 200 MB; class lists and templates need none of it.
    if name == "TextEncoder":
        from zs3fast.text.encoder import TextEncoder

        return TextEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
