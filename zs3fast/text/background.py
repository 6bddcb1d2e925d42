"""What else is in a photo: things and stuff that compete with a user's classes and stay unlabelled.

The 26 background words of the training-free methods' class lists (`competing_names.BACKGROUND_NAMES`), each with the
words that mean the same: where a user asks for one of these, the word does not compete.
"""

from __future__ import annotations

from collections.abc import Iterable

from zs3fast.text.vocabulary import ClassEntry, same_name

BACKGROUND: tuple[tuple[str, ...], ...] = (
    ("sky", "cloudless sky", "blue sky"),
    ("wall", "brick wall", "concrete wall"),
    ("tree", "bush", "plant", "vegetation", "foliage"),
    ("wood", "woods", "forest", "timber"),
    ("grass", "lawn", "meadow", "field"),
    ("road", "street", "pavement", "asphalt", "sidewalk", "path"),
    ("sea", "ocean", "water"),
    ("river", "stream", "creek", "water", "lake"),
    ("mountain", "peak", "rock"),
    ("sands", "sand", "beach", "desert"),
    ("desk", "table", "diningtable", "dining table", "counter"),
    ("bed", "mattress"),
    ("building", "house", "skyscraper", "tower"),
    ("cloud",),
    ("lamp", "light", "lantern"),
    ("door", "gate"),
    ("window", "windowpane", "pane"),
    ("wardrobe", "closet", "cupboard", "cabinet"),
    ("ceiling", "roof"),
    ("shelf", "bookshelf", "bookcase", "rack"),
    ("curtain", "drape", "blind"),
    ("stair", "stairs", "staircase", "stairway", "step"),
    ("floor", "ground", "carpet", "rug"),
    ("hill", "slope"),
    ("rail", "railing", "railroad", "rails", "guardrail", "track"),
    ("fence", "hedge"),
)


def background_for(classes: Iterable[ClassEntry]) -> list[ClassEntry]:
    """The words of `BACKGROUND` that none of the classes means, singular or plural, by any of its names."""
    asked = {form for entry in classes for name in entry for form in _forms(name)}
    return [(words[0],) for words in BACKGROUND if asked.isdisjoint(form for word in words for form in _forms(word))]


def _forms(name: str) -> set[str]:
    """A name as it stands, and its singular: good enough to meet in, "shelves" and "shelf" as "shel"."""
    plain = same_name(name)
    forms = {plain, plain.removesuffix("s"), plain.removesuffix("es")}
    if plain.endswith(("ves", "f")):
        forms.add(plain.removesuffix("ves").removesuffix("f"))
    if plain.endswith("ies"):
        forms.add(plain.removesuffix("ies") + "y")
    return forms - {""}
