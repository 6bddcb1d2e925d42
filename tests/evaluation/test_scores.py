"""Counts against counting by hand, and scores against their definitions written out one class at a time."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.toy import brute_force_table
from zs3fast.evaluation import BinaryCounts, Confusion, scores
from zs3fast.evaluation.pairs import group_by_image


@st.composite
def label_maps(draw):
    """Classes, ignore index, and a few pairs (prediction, target) of one type each."""
    classes = draw(st.integers(1, 6))
    ignore = draw(st.sampled_from([255, -1, classes]))
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(draw(st.integers(0, 3))):
        size = (draw(st.integers(0, 5)), draw(st.integers(1, 5)))
        target = rng.integers(0, classes, size).astype(draw(st.sampled_from([np.int32, np.int64, np.int16])))
        target[rng.random(size) < 0.3] = ignore
        lowest = draw(st.sampled_from([-1, 0]))
        pairs.append((rng.integers(lowest, classes, size).astype(np.int32), target))
    return classes, ignore, pairs


def counted(classes, ignore, pairs):
    confusion = Confusion(classes, ignore)
    for prediction, target in pairs:
        before = confusion.table.clone()
        added = confusion.update(prediction, torch.from_numpy(target))
        assert torch.equal(before + added, confusion.table)
    return confusion


@settings(max_examples=60, deadline=None)
@given(label_maps())
def test_counts_are_those_of_one_pixel_at_a_time(case):
    confusion = counted(*case)
    expected = brute_force_table(case[2], case[0], case[1])
    assert np.array_equal(confusion.table.numpy(), expected)
    assert np.array_equal(confusion.counts.numpy(), expected[:, :-1]) and confusion.counts.dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(label_maps(), st.sampled_from(["gt_or_pred", "gt"]), st.data())
def test_scores_are_their_definitions(case, denominator, data):
    classes, ignore, pairs = case
    seen = data.draw(st.lists(st.integers(0, classes - 1), unique=True))
    got = scores(counted(*case), seen, denominator)
    flat = [(p, t) for prediction, target in pairs for p, t in zip(prediction.ravel(), target.ravel()) if t != ignore]
    iou, accuracy, truth = [], [], []
    for c in range(classes):
        hit = sum(p == c == t for p, t in flat)
        in_truth, in_prediction = sum(t == c for _, t in flat), sum(p == c for p, _ in flat)
        counts = in_truth > 0 if denominator == "gt" else in_truth + in_prediction > 0
        iou.append(100 * hit / (in_truth + in_prediction - hit) if counts else math.nan)
        accuracy.append(100 * hit / in_truth if in_truth else math.nan)
        truth.append(in_truth)

    def nanmean(values):
        values = [value for value in values if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan

    s, u = nanmean([iou[c] for c in seen]), nanmean([iou[c] for c in range(classes) if c not in seen])
    expected = {
        "miou": nanmean(iou),
        "miou_seen": s,
        "miou_unseen": u,
        "hiou": 0.0 if s + u == 0 else 2 * s * u / (s + u),
        "macc": nanmean(accuracy),
        "pacc": 100 * sum(p == t for p, t in flat) / len(flat) if flat else math.nan,
        "fwiou": sum(i * g for i, g in zip(iou, truth) if g) / sum(truth) if sum(truth) else math.nan,
    }
    for name, value in expected.items():
        assert getattr(got, name) == pytest.approx(value, rel=1e-12, nan_ok=True), name
    np.testing.assert_allclose(got.iou, iou, rtol=1e-12)
    np.testing.assert_allclose(got.accuracy, accuracy, rtol=1e-12)
    json.dumps(got.to_dict(), allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(label_maps(), st.data())
def test_binary_counts_are_those_of_one_pixel_at_a_time(case, data):
    classes, ignore, pairs = case
    binary, expected = BinaryCounts(classes, ignore), np.zeros((classes, 4), int)
    for prediction, target in pairs:
        c, times = data.draw(st.integers(0, classes - 1)), data.draw(st.integers(1, 3))
        added = binary.update(prediction == c, target, c, times)
        one = np.zeros(4, int)
        for p, t in zip(prediction.ravel(), target.ravel()):
            if t != ignore:
                one[(0 if t == c else 1) if p == c else (2 if t == c else 3)] += 1
        assert added.tolist() == one.tolist()
        expected[c] += times * one
    assert np.array_equal(binary.table.numpy(), expected)
    iou = [100 * row[0] / row[:3].sum() for row in expected if row[:3].sum()]
    assert binary.miou() == pytest.approx(np.mean(iou) if iou else math.nan, nan_ok=True)
    tp, fp, fn, tn = expected.sum(0)
    both = [100 * part / (part + fp + fn) if part + fp + fn else math.nan for part in (tp, tn)]
    assert binary.fb_iou() == pytest.approx(np.mean(both), nan_ok=True)


def test_fb_iou_pools_classes_and_is_not_a_mean_of_theirs():
    """A large easy class and a small hard one: pooling weighs by pixels, a mean of per-class values would not."""
    binary = BinaryCounts(2)
    target = np.array([[0] * 80 + [1] * 20])
    binary.update(target == 0, target, 0)
    binary.update(np.array([[False] * 90 + [True] * 10]), target, 1)
    tp, fp, fn, tn = 80 + 10, 0, 10, 20 + 80
    assert binary.fb_iou() == pytest.approx(50 * (tp / (tp + fp + fn) + tn / (tn + fp + fn)))
    per_class = [50 * (80 / 80 + 20 / 20), 50 * (10 / 20 + 80 / 90)]
    assert abs(binary.fb_iou() - np.mean(per_class)) > 5
    assert binary.miou() == pytest.approx((100 + 50) / 2), "and mIoU does not pool"


def test_binary_counts_of_a_confusion_ask_every_pixel_about_every_class():
    rng = np.random.default_rng(3)
    target, prediction = rng.integers(0, 5, (9, 9)), rng.integers(-1, 5, (9, 9))
    target[:2] = 255
    confusion, binary = Confusion(5), BinaryCounts(5)
    confusion.update(prediction, target)
    for c in range(5):
        binary.update(prediction == c, target, c)
    assert torch.equal(BinaryCounts.from_confusion(confusion).table, binary.table)
    assert scores(confusion).fb_iou == binary.fb_iou()


def test_denominators_differ_on_a_class_that_is_only_predicted():
    """MAFT on PC-459: dividing by predicted classes too takes 15.57 down to 12.85."""
    confusion = Confusion(4)
    confusion.update(np.array([[0, 0, 2, 2]]), np.array([[0, 0, 0, 1]]))
    assert scores(confusion).iou[:3] == pytest.approx([200 / 3, 0, 0]) and math.isnan(scores(confusion).iou[3])
    assert scores(confusion).miou == pytest.approx(200 / 9)
    assert scores(confusion, denominator="gt").miou == pytest.approx(100 / 3)


def test_no_split_no_group_means():
    confusion = Confusion(2)
    confusion.update(np.array([[0, 1]]), np.array([[0, 1]]))
    got = scores(confusion)
    assert (got.pacc, got.miou, got.macc, got.fwiou) == (100, 100, 100, 100)
    assert math.isnan(got.miou_seen) and math.isnan(got.miou_unseen) and math.isnan(got.hiou)
    assert got.to_dict()["hiou"] is None
    alone = scores(confusion, [0, 1])
    assert alone.miou_seen == 100 and math.isnan(alone.miou_unseen) and math.isnan(alone.hiou)


def test_many_classes_and_sixteen_bit_labels():
    classes, rng = 847, np.random.default_rng(0)
    target = rng.integers(0, classes, (40, 50)).astype(np.uint16)
    target[:3] = 65535
    prediction = rng.integers(0, classes, (40, 50))
    confusion = Confusion(classes, 65535)
    confusion.update(prediction, target)
    assert np.array_equal(confusion.table.numpy(), brute_force_table([(prediction, target)], classes, 65535))


@pytest.mark.parametrize(
    "prediction, target, message",
    [
        ([[0, 4]], [[0, 1]], r"prediction: expected labels -1..3, got 4"),
        ([[0, -2]], [[0, 255]], r"prediction: expected labels -1..3, got -2"),
        ([[0, 1]], [[0, 4]], r"target: expected labels 0..3 or 255 \(ignore\), got 4"),
        ([[0, 1]], [[0, -1]], r"target: expected labels 0..3 or 255 \(ignore\), got -1"),
        ([[0, 1]], [[0], [1]], r"prediction: expected the target's shape \[2, 1\], got \[1, 2\]"),
    ],
)
def test_bad_labels(prediction, target, message):
    confusion = Confusion(4)
    with pytest.raises(ValueError, match=message):
        confusion.update(np.array(prediction), np.array(target))
    assert not confusion.table.any(), "a refused image leaves no trace"


def test_bad_arguments():
    with pytest.raises(TypeError, match="prediction: expected integer labels, got torch.float64"):
        Confusion(2).update(np.zeros((1, 1)), np.zeros((1, 1), int))
    with pytest.raises(TypeError, match="target: expected a tensor or an array of labels, got list"):
        Confusion(2).update(np.zeros((1, 1), int), [[0]])
    with pytest.raises(ValueError, match="ignore_index: expected none of the 459 classes, got 255"):
        Confusion(459)
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        Confusion(0)
    with pytest.raises(ValueError, match="denominator: expected one of gt_or_pred, gt, got 'all'"):
        scores(Confusion(2), [0], "all")
    with pytest.raises(ValueError, match=r"seen: expected indices in 0..1, got 2"):
        scores(Confusion(2), [2])
    with pytest.raises(TypeError, match="prediction: expected a bool mask, got torch.int64"):
        BinaryCounts(2).update(np.zeros((1, 1), int), np.zeros((1, 1), int), 0)
    with pytest.raises(ValueError, match=r"class_index: expected 0..1, got 2"):
        BinaryCounts(2).update(np.zeros((1, 1), bool), np.zeros((1, 1), int), 2)


def test_pairs_of_one_image_come_together():
    pairs = [(3, 1), (0, 2), (3, 0), (3, 1)]
    assert group_by_image(pairs) == [(3, {1: 2, 0: 1}), (0, {2: 1})]
