"""The procedural world: scenes that depend on their index alone, exact labels, captions that hold, a fair split."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from zs3fast.data import PairSet, TrainingSet, open_dataset, train_transform
from zs3fast.data.world import (
    ALL_STUFF,
    ALL_THINGS,
    CLASS_NAMES,
    CLASSES,
    SEEN,
    UNSEEN,
    CaptionSet,
    WorldDataset,
    arrange,
    draw,
    part_map,
    random_scene,
)
from zs3fast.data.world.captions import caption
from zs3fast.data.world.shapes import pattern_weight, shape_field
from zs3fast.data.world.textures import PERIOD, tiles
from zs3fast.data.world.vocabulary import COLOURS, MATERIALS, PATTERNS, SHAPES, STUFF, THINGS
from zs3fast.text import parse_classes

PATCHES = np.arange(6, 96, 12)
# Of version 2: labels at the patches of test scene 7, mean colours of its fourth column of them, one caption.
GOLDEN_LABELS = [
    [59, 59, 59, 59, 59, 57, 57, 57],
    [59, 59, 59, 59, 57, 57, 57, 57],
    [59, 59, 59, 57, 57, 57, 57, 57],
    [59, 57, 57, 6, 6, 57, 57, 54],
    [57, 57, 6, 6, 6, 57, 54, 54],
    [57, 57, 6, 6, 6, 54, 54, 54],
    [57, 57, 57, 54, 13, 13, 54, 54],
    [57, 57, 54, 54, 13, 54, 13, 54],
]
GOLDEN_COLOURS = [
    [185, 168, 206],
    [148, 99, 156],
    [191, 92, 106],
    [46, 112, 232],
    [38, 110, 231],
    [35, 102, 215],
    [139, 94, 105],
    [194, 115, 109],
]
GOLDEN_CAPTION = "a checkered red ring"


def scene(seed: int, size: tuple[int, int] = (64, 64), **options):
    options = {"things": (1, 4), "grounds": (1, 3), **options}
    return random_scene(np.random.default_rng(seed), size, **options)


# Vocabulary ----------------------------------------------------------------------------------------------------------


def test_the_vocabulary():
    assert (len(ALL_THINGS), len(ALL_STUFF), len(THINGS), len(STUFF)) == (144, 48, 48, 16)
    assert len(parse_classes(CLASS_NAMES)) == 64  # all different, for CLIP too
    assert {"striped red triangle", "yellow sand"} <= set(CLASS_NAMES)
    assert sorted((*SEEN, *UNSEEN)) == list(range(64)) and len(UNSEEN) == 16
    assert set(THINGS) <= set(ALL_THINGS) and set(STUFF) <= set(ALL_STUFF)


def test_every_word_of_an_unseen_class_is_part_of_seen_ones():
    seen_words = Counter(word for c in SEEN for word in CLASSES[c])
    for c in UNSEEN:
        assert all(seen_words[word] for word in CLASSES[c]), CLASS_NAMES[c]
    unseen = Counter(word for c in UNSEEN if CLASSES[c] in THINGS for word in CLASSES[c])
    assert all(unseen[p] == 3 for p in PATTERNS) and all(unseen[w] == 2 for w in (*COLOURS, *SHAPES))
    assert all(seen_words[material] for material in MATERIALS)


def test_every_class_has_a_neighbour_that_differs_in_one_word():
    for concept in CLASSES:
        others = [o for o in CLASSES if len(o) == len(concept)]
        assert any(sum(a != b for a, b in zip(o, concept)) == 1 for o in others), concept


# Scenes --------------------------------------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_its_index():
    first, second = WorldDataset("val"), WorldDataset("val")
    a = [second[i] for i in (3, 1)]  # another order, another object
    b = [first[i] for i in (1, 3)][::-1]
    for x, y in zip(a, b):
        assert np.array_equal(x.image, y.image) and np.array_equal(x.labels, y.labels) and x.id == y.id
    assert not np.array_equal(first[0].image, first[1].image)
    assert not np.array_equal(first[0].image, WorldDataset("test")[0].image)


def test_version_2_still_paints_what_it_painted():
    """What weights and tables rest on. A change here needs a new `VERSION`; libraries may differ by a rounding."""
    sample = WorldDataset("test")[7]
    assert sample.labels[np.ix_(PATCHES, PATCHES)].tolist() == GOLDEN_LABELS
    colours = sample.image.reshape(8, 12, 8, 12, 3).mean((1, 3)).round().astype(int)[:, 3]
    assert np.abs(colours - np.array(GOLDEN_COLOURS)).max() <= 1
    assert WorldDataset("train")[0].id == "world_train_000000"
    assert CaptionSet(64, 5)[11]["caption"] == GOLDEN_CAPTION


@pytest.mark.parametrize("size", [(96, 96), (70, 101)])
def test_labels_without_painting_are_the_same(size):
    dataset = WorldDataset("val", size=size, length=5)
    for index in range(5):
        sample = dataset[index]
        assert sample.image.shape == (*size, 3) and sample.image.dtype == np.uint8
        assert sample.labels.shape == size and sample.labels.dtype == np.int32
        assert np.array_equal(sample.labels, dataset.read_labels(index))


def test_things_are_where_the_labels_say():
    """The colour inside a plain thing is its own; a pixel outside its outline is not labelled as it."""
    for number, concept in enumerate(t for t in THINGS if t[0] == "plain"):
        one = arrange(np.random.default_rng(number), (64, 64), [concept], [("green", "leaves")])
        image, parts = draw(one)
        thing = one.things[0]
        y, x = (np.arange(64) - c for c in thing.centre)
        c, s = np.cos(thing.angle), np.sin(thing.angle)
        field = shape_field(concept[2], c * x + s * y[:, None], c * y[:, None] - s * x, thing.radius)
        assert np.array_equal(parts == 1, field < 0) or (np.abs(field[(parts == 1) != (field < 0)]) < 1e-3).all()
        inside = image[field < -1.8].astype(float)
        assert np.abs(inside.mean(0) - COLOURS[concept[1]]).max() < 45, concept


@pytest.mark.parametrize("shape", SHAPES)
def test_fields_are_distances_near_the_outline(shape):
    y, x = np.mgrid[-30:31, -30:31].astype(np.float32)
    field = shape_field(shape, x, y, 20.0)
    slope = np.hypot(*np.gradient(field))
    near = np.abs(field) < 1.5
    assert np.median(slope[near]) == pytest.approx(1, abs=0.05)
    outside = field[np.hypot(x, y) > 22.5]
    assert (outside > 0).all()
    assert 0.25 < (field < 0).sum() / (np.pi * 20**2) < 0.9  # none is a speck


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern):
    y, x = np.mgrid[0:64, 0:64].astype(np.float32)
    weight = pattern_weight(pattern, x, y, 8.0, (0.1, 0.3))
    assert weight.shape == (64, 64) and weight.min() >= 0 and weight.max() <= 1
    assert np.allclose(weight[:, 8:], weight[:, :-8], atol=1e-4) and np.allclose(weight[8:], weight[:-8], atol=1e-4)
    low, high = {"plain": (0, 0), "striped": (0.45, 0.55), "checkered": (0.4, 0.6), "dotted": (0.15, 0.4)}[pattern]
    assert low <= weight.mean() <= high
    assert (np.ptp(weight, axis=1).max() == 0) == (pattern in ("plain", "striped"))  # stripes run along x


@pytest.mark.parametrize("material", MATERIALS)
def test_tiles_are_periodic_and_differ(material):
    for tile in tiles(material):
        assert tile.shape == (PERIOD, PERIOD) and tile.dtype == np.uint8 and tile.std() > 8
        inner = np.abs(np.diff(tile.astype(int), axis=0)).mean(1)
        seam = np.abs(tile[0].astype(int) - tile[-1]).mean()
        assert seam <= inner.max() + 1  # no edge where the tile repeats
    assert not np.array_equal(tiles(material)[0], tiles(material)[1])


def test_skies_are_above():
    for seed in range(40):
        one = arrange(np.random.default_rng(seed), (64, 64), [], [("yellow", "sand"), ("blue", "sky")])
        assert one.concepts == (("blue", "sky"), ("yellow", "sand"))
        rows, _ = np.nonzero(part_map(one) == 0)
        assert rows.mean() < 32


def test_scenes_hold_what_was_asked_for():
    counts = Counter()
    for seed in range(60):
        one = scene(seed, things=(2, 3), grounds=(1, 2))
        assert 2 <= len(one.things) <= 3 and 1 <= len(one.grounds) <= 2
        assert len(set(one.concepts)) == len(one.concepts)
        assert set(one.concepts) <= set(CLASSES)
        counts[len(one.things), len(one.grounds)] += 1
    assert len(counts) == 4
    assert any(set(scene(seed, all_combinations=True).concepts) - set(CLASSES) for seed in range(3))


# Dataset -------------------------------------------------------------------------------------------------------------


def test_the_contract():
    train, val = WorldDataset("train"), WorldDataset("val")
    assert (len(train), len(val), len(WorldDataset("test"))) == (10_000, 500, 1_000)
    assert (val.name, val.split, val.num_classes, val.ignore_index, val.background) == ("world", "val", 64, 255, None)
    assert val.seen == list(SEEN) and val.unseen == list(UNSEEN) and val.class_names == list(CLASS_NAMES)
    assert val.missing() == [] and len(set(val.ids)) == 500
    with pytest.raises(IndexError, match="index: expected 0..499, got 500"):
        val[500]


def test_every_class_is_there_in_every_split():
    for split in ("train", "val", "test"):
        dataset = WorldDataset(split, length=300)
        pixels = sum(np.bincount(dataset.read_labels(i).ravel(), minlength=64) for i in range(300))
        assert pixels.min() > 200 and len(pixels) == 64
        things = pixels[:48].sum() / pixels.sum()
        assert 0.15 < things < 0.5


def test_it_trains_like_other_datasets():
    data = TrainingSet(WorldDataset("train", length=6), train_transform("clsclip", 64), seed=2)
    batch = next(iter(DataLoader(data, batch_size=4)))
    assert batch["images"].shape == (4, 3, 64, 64) and batch["labels"].max() < 64
    assert torch.equal(data[3]["images"], batch["images"][3])


def test_it_opens_by_name():
    opened = open_dataset("world", None, "test")
    assert isinstance(opened, WorldDataset) and len(opened) == 1000
    assert np.array_equal(opened.read_labels(7), WorldDataset("test").read_labels(7))
    with pytest.raises(ValueError, match="root, fold: world has neither, expected None, got data"):
        open_dataset("world", "data", "test")
    with pytest.raises(ValueError, match="name: expected one of ade150, .*, world, or a YAML file .*, got 'worlds'"):
        open_dataset("worlds", None, "test")
    with pytest.raises(ValueError, match="root: expected the folder of voc20"):
        open_dataset("voc20", None, "train")


@pytest.mark.parametrize("recipe", ["clsclip", "flip"])
def test_pairs(tmp_path, monkeypatch, recipe):
    """What the label maps hold is cached by what they depend on."""
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path))
    short = PairSet(WorldDataset("train", length=4), train_transform(recipe, 64))
    long = PairSet(WorldDataset("train", length=8), train_transform(recipe, 64))
    assert len(long) > len(short) and not set(short.pairs[:, 1]) & set(UNSEEN)
    item = short[0]
    assert (item["labels"] == item["class_index"]).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WorldDataset("training"), "split: expected one of train, val, test, got 'training'"),
        (lambda: WorldDataset("val", size=(16, 64)), "size: expected at least 32 pixels a side"),
        (lambda: WorldDataset("val", length=0), "length: expected at least 1, got 0"),
        (lambda: CaptionSet(16), "size: expected at least 32, got 16"),
        (lambda: CaptionSet(64, -1), "seed: expected at least 0, got -1"),
        (lambda: arrange(np.random.default_rng(0), (64, 64), [], []), "grounds: expected one to three, got 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Captions ------------------------------------------------------------------------------------------------------------


def test_captions_name_what_is_there_and_nothing_else():
    """Every word of a colour, pattern, shape or material belongs to a visible part; whole captions name all of them."""
    vocabulary = {*PATTERNS, *COLOURS, *SHAPES, *MATERIALS}
    for seed in range(150):
        one = scene(seed, all_combinations=True)
        _, parts = draw(one)
        sentence = caption(one, parts, np.random.default_rng(seed))
        shares = np.bincount(parts.ravel(), minlength=len(one.concepts)) / parts.size
        shown = [concept for concept, share in zip(one.concepts, shares) if share > 0.012]
        said = set(sentence.lower().replace(",", "").replace(".", "").split()) & vocabulary
        assert said <= {word for concept in shown for word in concept}, sentence
        things = [concept for concept in shown if len(concept) == 3]
        if " on " in sentence or " with " in sentence:
            assert all(concept[-1] in said for concept in shown), sentence
        elif " and " in sentence:
            told = things if said & {*SHAPES} else [concept for concept in shown if len(concept) == 2]
            assert all(concept[-1] in said for concept in told), sentence
        else:
            assert said, sentence


def test_every_class_occurs_in_captions():
    pairs = CaptionSet(32)
    said = " ".join(pairs[p]["caption"] for p in range(2500))
    missing = [name for name in CLASS_NAMES if name not in said]
    assert not missing


def test_a_pair_is_a_function_of_seed_and_position():
    pairs = CaptionSet(48, seed=1)
    items = [pairs[p] for p in (9, 4)]
    again = [CaptionSet(48, seed=1)[p] for p in (4, 9)][::-1]
    for x, y in zip(items, again):
        assert torch.equal(x["images"], y["images"]) and x["caption"] == y["caption"]
        assert x["images"].shape == (3, 48, 48) and x["images"].dtype == torch.uint8
    assert not torch.equal(CaptionSet(48, seed=2)[9]["images"], items[0]["images"])
