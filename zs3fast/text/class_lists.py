"""The class lists of the published protocols, in dataset order, and which of their classes training never sees.

Names are the dataset strings verbatim: the prepared text embeddings of the official code were made from exactly these.
ADE20K names are the first of each row of the benchmark's own object list.
"""

from __future__ import annotations

from typing import Any

from zs3fast.text.ade847 import ADE847, ADE847_UNSEEN
from zs3fast.text.pc459 import PC459


def _split(names: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in names.split(","))


VOC20 = _split(
    """
    aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike,
    person, pottedplant, sheep, sofa, train, tvmonitor
    """
)

COCO171 = _split(
    """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
    skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple,
    sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining
    table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink,
    refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush, banner, blanket, branch,
    bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes,
    clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other,
    floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel,
    ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper,
    pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof,
    rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
    structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other,
    wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
    """
)

CONTEXT59 = _split(
    """
    aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat,
    ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground,
    horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep,
    shelves, sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window,
    wood
    """
)

CONTEXT60 = ("background", *CONTEXT59)

ADE150 = _split(
    """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth,
    door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug,
    field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column,
    signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path,
    stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee
    table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair,
    boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet,
    poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel,
    basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot,
    animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
    ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
    """
)

VOC21 = ("background", *VOC20)

COCO_OBJECT = ("background", *COCO171[:80])

CITYSCAPES = _split(
    """
    road, sidewalk, building, wall, fence, pole, trafficlight, trafficsign, vegetation, terrain, sky, person,
    rider, car, truck, bus, train, motorcycle, bicycle
    """
)

CLASS_NAMES = {
    "voc20": VOC20,
    "voc21": VOC21,
    "coco171": COCO171,
    "coco_object": COCO_OBJECT,
    "context59": CONTEXT59,
    "context60": CONTEXT60,
    "pc459": PC459,
    "ade150": ADE150,
    "ade847": ADE847,
    "cityscapes": CITYSCAPES,
}

# The others have no published zero-shot split: they are cross-dataset tests, where nothing is seen.
UNSEEN = {
    "voc20": (15, 16, 17, 18, 19),
    "coco171": (19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160),
    "context59": (0, 6, 7, 14, 19, 24, 31, 33, 48, 54),
    "context60": (1, 7, 8, 15, 20, 25, 32, 34, 49, 55),
    "ade847": ADE847_UNSEEN,
}


def datasets() -> list[str]:
    """Names that `class_names` knows."""
    return list(CLASS_NAMES)


def class_names(dataset: str) -> list[str]:
    """Class names of a dataset, one of `datasets()`, in the order of its label values."""
    return list(CLASS_NAMES[_known(dataset)])


def unseen_classes(dataset: str) -> list[int]:
    """Indices of the classes that zero-shot training never sees, ascending.

    Raises:
        ValueError: unknown dataset, or one without a published zero-shot split (ade150).
    """
    if _known(dataset) not in UNSEEN:
        raise ValueError(
            f"dataset: expected one with a published seen/unseen split, {', '.join(UNSEEN)}, got {dataset}"
        )
    return list(UNSEEN[dataset])


def seen_classes(dataset: str) -> list[int]:
    """Indices of the classes with labels in zero-shot training, ascending: all but `unseen_classes`."""
    unseen = set(unseen_classes(dataset))
    return [c for c in range(len(CLASS_NAMES[dataset])) if c not in unseen]


def training_vocabulary(trained_on: str) -> dict[str, Any]:
    """What `load_official` should know of the dataset that a checkpoint was trained on: names, their number, the seen.

    Raises:
        ValueError: unknown dataset, or one without a published split.
    """
    if trained_on not in UNSEEN:
        what = "has no published seen/unseen split" if trained_on in CLASS_NAMES else "is not known"
        raise ValueError(f"trained_on: expected one of {', '.join(UNSEEN)}, got {trained_on!r}, which {what}")
    names = class_names(trained_on)
    return {"class_names": names, "num_classes": len(names), "seen": seen_classes(trained_on)}


def _known(dataset: str) -> str:
    if dataset not in CLASS_NAMES:
        raise ValueError(f"dataset: expected one of {', '.join(CLASS_NAMES)}, got {dataset!r}")
    return dataset
