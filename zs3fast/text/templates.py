"""Prompt templates: the sentences a class name is put into before CLIP's text tower reads it."""

from __future__ import annotations

from collections.abc import Sequence

SINGLE = ("a photo of a {}",)  # the VOC embeddings' one; it has no full stop

MULTI = (
    "a photo of a {}.",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "a {} in the scene.",
    "a photo of a {} in the scene.",
    "There is a {} in the scene.",
    "There is the {} in the scene.",
    "This is a {} in the scene.",
    "This is the {} in the scene.",
    "This is one {} in the scene.",
)

MAFT = (
    "a photo of a {}.",
    "This is a photo of a {}",  # four of them lack their full stop, as published
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)

CLIPSEG = ("a photo of a {}.", "a photograph of a {}.", "an image of a {}.", "{}.")

TEMPLATES = {"single": SINGLE, "multi": MULTI, "maft": MAFT, "clipseg": CLIPSEG}


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Templates by name ("single", the VOC embeddings'; "multi", the 15 of COCO-Stuff and Context;
    "maft", MAFT's 14; "clipseg", CLIPSeg's 4) or as given.

    Raises:
        ValueError: an unknown name, an empty list, or a template without exactly one {}.
    """
    if isinstance(templates, str):
        if templates not in TEMPLATES and "{}" not in templates:
            known = ", ".join(map(repr, TEMPLATES))
            raise ValueError(f"templates: expected {known} or sentences with one {{}}, got {templates!r}")
        templates = TEMPLATES.get(templates, (templates,))
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"templates: each needs exactly one {{}} for the class name, got {template!r}")
    if not templates:
        raise ValueError("templates: expected at least one, got none")
    return tuple(templates)
