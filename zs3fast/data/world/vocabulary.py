"""What there is in the world, and in which words: things are pattern, colour and shape, stuff is colour and material.

Captions name all combinations. The classes with labels are a third of them, chosen so that every class has neighbours
that differ in a single word; the unseen ones are combinations whose every word is also part of seen classes.
"""

from __future__ import annotations

PATTERNS = ("plain", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# sRGB of the pure paint; things wear it as it is, stuff is paler.
COLOURS = {
    "red": (216, 42, 46),
    "yellow": (246, 200, 36),
    "green": (44, 158, 66),
    "blue": (38, 104, 218),
    "purple": (138, 62, 182),
    "white": (243, 243, 240),
}
MATERIALS = ("sand", "grass", "water", "bricks", "wood", "sky", "pebbles", "leaves")

WORDS = frozenset((*PATTERNS, *SHAPES, *COLOURS, *MATERIALS))

Concept = tuple[str, ...]  # (pattern, colour, shape) or (colour, material)

ALL_THINGS: tuple[Concept, ...] = tuple((p, c, s) for p in PATTERNS for c in COLOURS for s in SHAPES)
ALL_STUFF: tuple[Concept, ...] = tuple((c, m) for m in MATERIALS for c in COLOURS)

# (pattern + colour + shape) % 3 == 0 by position in the lists: each word of each kind occurs equally often.
THINGS: tuple[Concept, ...] = tuple(
    thing
    for thing in ALL_THINGS
    if (PATTERNS.index(thing[0]) + list(COLOURS).index(thing[1]) + SHAPES.index(thing[2])) % 3 == 0
)
STUFF: tuple[Concept, ...] = (
    ("yellow", "sand"),
    ("white", "sand"),
    ("green", "grass"),
    ("yellow", "grass"),
    ("blue", "water"),
    ("green", "water"),
    ("red", "bricks"),
    ("white", "bricks"),
    ("yellow", "wood"),
    ("red", "wood"),
    ("blue", "sky"),
    ("purple", "sky"),
    ("white", "pebbles"),
    ("purple", "pebbles"),
    ("green", "leaves"),
    ("red", "leaves"),
)

# A quarter, as in VOC: three of each pattern, two of each colour and of each shape, no two words together twice; and
# one colour of every other material.
_UNSEEN_THINGS: tuple[Concept, ...] = (
    ("plain", "yellow", "ring"),
    ("plain", "blue", "star"),
    ("plain", "white", "square"),
    ("striped", "red", "triangle"),
    ("striped", "green", "circle"),
    ("striped", "purple", "cross"),
    ("dotted", "green", "ring"),
    ("dotted", "blue", "square"),
    ("dotted", "purple", "star"),
    ("checkered", "red", "circle"),
    ("checkered", "yellow", "triangle"),
    ("checkered", "white", "cross"),
)
_UNSEEN_STUFF: tuple[Concept, ...] = (
    ("white", "sand"),
    ("green", "water"),
    ("purple", "sky"),
    ("red", "leaves"),
)


def name_of(concept: Concept) -> str:
    """A concept as it is written: "striped red triangle", "yellow sand"."""
    return " ".join(concept)


CLASSES: tuple[Concept, ...] = (*THINGS, *STUFF)  # labels are indices into this
CLASS_NAMES: tuple[str, ...] = tuple(map(name_of, CLASSES))
UNSEEN: tuple[int, ...] = tuple(sorted(CLASSES.index(concept) for concept in (*_UNSEEN_THINGS, *_UNSEEN_STUFF)))
SEEN: tuple[int, ...] = tuple(c for c in range(len(CLASSES)) if c not in UNSEEN)
