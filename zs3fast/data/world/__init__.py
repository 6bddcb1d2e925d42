"""A procedural world: textured, coloured shapes on stuff, label maps, captions, seen and unseen combinations."""

from zs3fast.data.world.dataset import SPLITS, VERSION, CaptionSet, WorldDataset, class_labels
from zs3fast.data.world.scenes import Scene, arrange, draw, part_map, random_scene
from zs3fast.data.world.vocabulary import ALL_STUFF, ALL_THINGS, CLASS_NAMES, CLASSES, SEEN, UNSEEN, name_of

__all__ = [
    "ALL_STUFF",
    "ALL_THINGS",
    "CLASSES",
    "CLASS_NAMES",
    "SEEN",
    "SPLITS",
    "UNSEEN",
    "VERSION",
    "CaptionSet",
    "Scene",
    "WorldDataset",
    "arrange",
    "class_labels",
    "draw",
    "name_of",
    "part_map",
    "random_scene",
]
