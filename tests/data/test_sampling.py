"""Items depend on (seed, position) alone; ranks share an iteration; pairs are what the label maps hold."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.data.trees import palette_mask, stripes, voc, write_list
from zs3fast.data import (
    PairSet,
    PositionSampler,
    TrainingSet,
    class_pixels,
    images_per_class,
    open_dataset,
    test_pairs,
    train_transform,
)
from zs3fast.data.sampling import seed_worker

IDS = [f"i{n}" for n in range(5)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path):
    """Five training images of 12 x 16; i0 holds classes 0 and 5, i1 holds 0, i2 holds 5 and 16, i3 and i4 nothing."""
    values = {"i0": (1, 6, 0, 255), "i1": (1, 0), "i2": (6, 17), "i3": (0, 255), "i4": (0,)}
    voc(tmp_path, train=IDS, aug=(), val=("d", "e"), lists=("train_aug", "val"), values=values)
    return tmp_path


@pytest.fixture
def items(tree):
    return TrainingSet(open_dataset("voc20", tree, "train"), train_transform("zegclip", 16), seed=3)


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a)


# TrainingSet ---------------------------------------------------------------------------------------------------------


def test_an_epoch_is_every_sample_once(items):
    assert len(items) == 5
    for epoch in range(4):
        assert sorted(items[p]["id"] for p in range(5 * epoch, 5 * epoch + 5)) == IDS
    orders = {tuple(items._entry(p) for p in range(5 * epoch, 5 * epoch + 5)) for epoch in range(20)}
    assert len(orders) > 10


def test_items_do_not_depend_on_what_was_asked_before(items, tree):
    order = [7, 0, 23, 7, 12]
    got = [items[p] for p in order]
    fresh = TrainingSet(open_dataset("voc20", tree, "train"), train_transform("zegclip", 16), seed=3)
    assert all(same(item, fresh[p]) for p, item in zip(reversed(order), reversed(got)))
    assert not torch.equal(items[0]["images"], items[5 * 2]["images"])


def test_augmentation_draws_from_seed_and_position(items):
    position = 8
    index = items._entry(position)
    images, labels = items.transform(items.dataset[index], np.random.default_rng((3, position)))
    item = items[position]
    assert torch.equal(item["images"], images) and torch.equal(item["labels"], labels)
    assert item["id"] == items.dataset.ids[index]


def test_seeds_differ(items, tree):
    other = TrainingSet(items.dataset, items.transform, seed=4)
    assert [items._entry(p) for p in range(25)] != [other._entry(p) for p in range(25)]


def batches(items, workers, start=0, stop=6, rank=0, world=1, batch=4):
    sampler = PositionSampler(start, batch, rank, world, stop)
    loader = DataLoader(items, batch_sampler=sampler, num_workers=workers, worker_init_fn=seed_worker)
    return list(loader)


def test_workers_and_restarts_change_nothing(items):
    whole = batches(items, 0)
    assert len(whole) == 6 and whole[0]["images"].shape == (4, 3, 16, 16) and whole[0]["labels"].dtype == torch.int64
    for workers in (1, 2):
        assert all(same(a, b) for a, b in zip(whole, batches(items, workers), strict=True))
    assert all(same(a, b) for a, b in zip(whole[4:], batches(items, 2, start=4), strict=True))


def test_spawned_workers_get_the_same(items):
    """Where processes are not forked, everything travels pickled."""
    items[3]
    copy = pickle.loads(pickle.dumps(items))
    assert all(same(copy[p], items[p]) for p in (0, 3, 11))


def test_ranks_share_the_batch(items):
    whole = batches(items, 0)
    parts = [batches(items, 0, rank=rank, world=2) for rank in range(2)]
    for t, batch in enumerate(whole):
        assert torch.equal(batch["images"], torch.cat([part[t]["images"] for part in parts]))
        assert batch["id"] == [*parts[0][t]["id"], *parts[1][t]["id"]]


# PositionSampler -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 8))
def test_positions_of_an_iteration_do_not_depend_on_the_world(start, share, world, count):
    total = 12 * share
    ranks = [list(PositionSampler(start, total, rank, world, start + count)) for rank in range(world)]
    assert all(len(rank) == count for rank in ranks)
    for offset, parts in enumerate(zip(*ranks)):
        t = start + offset
        assert [p for part in parts for p in part] == list(range(t * total, (t + 1) * total))


def test_sampler_lengths_and_bad_arguments():
    assert len(PositionSampler(3, 4, stop_iteration=10)) == 7 and len(PositionSampler(9, 4, stop_iteration=2)) == 0
    endless = iter(PositionSampler(0, 2))
    assert [next(endless) for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(TypeError, match="has no length"):
        len(PositionSampler(0, 2))
    for arguments, message in [
        ((0, 3, 0, 2), "batch_size: expected a positive multiple of 2 processes, got 3"),
        ((0, 0), "batch_size: expected a positive multiple"),
        ((0, 4, 2, 2), "rank: expected 0..world - 1 .* got rank 2, world 2"),
        ((-1, 4), "start_iteration: expected at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            PositionSampler(*arguments)


def test_bad_training_sets(items, tree):
    with pytest.raises(ValueError, match="seed: expected at least 0, got -1"):
        TrainingSet(items.dataset, items.transform, seed=-1)
    with pytest.raises(IndexError, match="position"):
        items[-1]
    with pytest.raises(ValueError, match="transform: expected recipe 'clsclip'"):
        PairSet(items.dataset, items.transform)
    clsclip = train_transform("clsclip", 8)
    with pytest.raises(ValueError, match="classes: expected some of 0..19, got"):
        PairSet(items.dataset, clsclip, classes=[20])
    with pytest.raises(ValueError, match="negative_prob: expected 0..1, got 2"):
        PairSet(items.dataset, clsclip, negative_prob=2)
    with pytest.raises(ValueError, match="dataset: expected something to train on, got none in voc20 train"):
        PairSet(items.dataset, clsclip, classes=[9])


# What images hold --------------------------------------------------------------------------------------------------


def test_class_pixels_are_counted_once(tree, monkeypatch):
    dataset = open_dataset("voc20", tree, "train")
    expected = [{0: 48, 5: 48}, {0: 96}, {5: 96, 16: 96}, {}, {}]
    assert class_pixels(dataset) == expected
    assert images_per_class(dataset)[[0, 5, 16, 1]].tolist() == [2, 2, 1, 0]
    monkeypatch.setattr(type(dataset), "read_labels", None)  # from here on, only the cache can answer
    assert class_pixels(dataset) == expected


def test_a_changed_mask_is_read_again(tree):
    dataset = open_dataset("voc20", tree, "train")
    class_pixels(dataset)
    path = dataset.label_path(4)
    palette_mask(path, stripes((3,)))
    os.utime(path, ns=(1, 1))
    assert class_pixels(dataset)[4] == {2: 192}


@pytest.mark.parametrize("content", ["{", "[1]", json.dumps({"key": "another", "pictures": []})])
def test_a_damaged_cache_is_replaced(tree, content):
    dataset = open_dataset("voc20", tree, "train")
    expected = class_pixels(dataset)
    (file,) = (tree / "cache/data").iterdir()
    file.write_text(content)
    assert class_pixels(dataset) == expected
    assert json.loads(file.read_text())["pictures"][1] == [0, 96]


# PairSet -------------------------------------------------------------------------------------------------------------


def pair_set(tree, **options):
    dataset = open_dataset("voc5i", tree, "train", fold=3)  # holds out 15..19
    return PairSet(dataset, train_transform("clsclip", 8), seed=1, **options)


def test_an_epoch_is_every_pair_once(tree):
    pairs = pair_set(tree)
    assert pairs.classes == tuple(range(15))
    assert pairs.pairs.tolist() == [[0, 0], [0, 5], [1, 0], [2, 5]] and len(pairs) == 4
    for epoch in range(5):
        got = [(item["id"], item["class_index"]) for item in (pairs[4 * epoch + n] for n in range(4))]
        assert sorted(got) == [("i0", 0), ("i0", 5), ("i1", 0), ("i2", 5)]


def test_the_class_is_in_the_crop(tree):
    pairs = pair_set(tree)
    for position in range(100):
        item = pairs[position]
        assert (item["labels"] == item["class_index"]).any()
        assert item["images"].shape == (3, 8, 8)
    assert same(pairs[17], pair_set(tree)[17])


def test_pair_options(tree):
    assert pair_set(tree, drop_unseen_images=True).pairs.tolist() == [[0, 0], [0, 5], [1, 0]]
    assert pair_set(tree, min_pixels=49).pairs.tolist() == [[1, 0], [2, 5]]
    assert pair_set(tree, classes=[16]).pairs.tolist() == [[2, 16]]


def test_negatives(tree):
    pairs = pair_set(tree, negative_prob=0.5)
    items = [pairs[position] for position in range(200)]
    absent = [item for item in items if not (item["labels"] == item["class_index"]).any()]
    held = {"i0": {0, 5}, "i1": {0}, "i2": {5, 16}}
    assert all(item["class_index"] in set(range(15)) - held[item["id"]] for item in absent)
    assert 60 < len(absent) < 140
    pairs = pair_set(tree, negative_prob=1.0, classes=[0])
    items = [pairs[position] for position in range(6)]
    assert all((item["labels"] == 0).any() for item in items), "no class of the list is absent: a positive"


def test_pairs_in_a_loader(tree):
    batch = batches(pair_set(tree), 2, stop=2)[1]
    assert batch["class_index"].shape == (4,) and batch["class_index"].dtype == torch.int64


# test_pairs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tested(tmp_path):
    """64 x 64 images, so that half of one is 2048 pixels, the least that PASCAL-5i's lists take."""
    place = voc(tmp_path, val=("p", "q", "r"))
    for name, mask in {"p": stripes((1, 2), (64, 64)), "q": stripes((2, 3, 0, 20), (64, 64))}.items():
        palette_mask(place / f"SegmentationClass/{name}.png", mask)
    palette_mask(place / "SegmentationClass/r.png", stripes((2,), (64, 64)))
    return open_dataset("voc5i", tmp_path, "val", fold=0)


def test_all_pairs(tested):
    assert test_pairs(tested, tested.unseen) == [(0, 0), (0, 1), (2, 1)]
    assert test_pairs(tested, tested.unseen, min_pixels=1) == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 1)]
    assert test_pairs(tested, [19], min_pixels=1) == [(1, 19)]
    assert test_pairs(tested, [7]) == []


def test_episodes_go_round(tested):
    assert test_pairs(tested, tested.unseen, 5) == [(0, 0), (0, 1), (2, 1), (0, 0), (0, 1)]


def test_episodes_by_class_then_image(tested):
    drawn = test_pairs(tested, tested.unseen, 3000, draw="uniform", min_pixels=1)
    assert drawn == test_pairs(tested, tested.unseen, 3000, draw="uniform", min_pixels=1)
    assert drawn != test_pairs(tested, tested.unseen, 3000, draw="uniform", min_pixels=1, seed=1)
    share = {pair: drawn.count(pair) / 3000 for pair in set(drawn)}
    expected = {(0, 0): 1 / 3, (0, 1): 1 / 9, (1, 1): 1 / 9, (2, 1): 1 / 9, (1, 2): 1 / 3}
    assert share == pytest.approx(expected, abs=0.03)


def test_pairs_of_a_published_list(tested, tmp_path):
    listing = tmp_path / "fold0.txt"
    write_list(listing, ["q__02", "p__01", "q__20", ""])
    assert test_pairs(tested, tested.unseen, pair_list=listing) == [(1, 1), (0, 0)]
    for line in ("x__01", "p__00", "p__22", "p_01", "p__"):
        write_list(listing, ["p__01", line])
        with pytest.raises(ValueError, match=rf"pair_list: .*fold0.txt, line 2: .* got '{line}'"):
            test_pairs(tested, tested.unseen, pair_list=listing)


def test_bad_protocols(tested):
    for arguments, message in [
        (([], "all"), "classes: expected some of 0..20"),
        (([0], "some"), "episodes: expected 'all' or a number from 1, got 'some'"),
        (([0], 0), "episodes"),
    ]:
        with pytest.raises(ValueError, match=message):
            test_pairs(tested, *arguments)
    with pytest.raises(ValueError, match="draw: expected cycle or uniform, got 'once'"):
        test_pairs(tested, [0], 3, draw="once")
