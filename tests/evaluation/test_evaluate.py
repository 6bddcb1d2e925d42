"""The loop over a test set: every image once, the same with any number of processes and after an interruption."""

from __future__ import annotations

import pickle
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from tests.evaluation.toy import NAMES, PAIRS, SEEN, Sample, ToyDataset, brute_force_table, toy_labels, toy_masks
from tests.evaluation.two_processes import both_reports, same, worker
from tests.tiny import tiny_model
from zs3fast.evaluation import (
    PairSegmenter,
    PartialResults,
    Setting,
    evaluate,
    evaluate_pairs,
    labeller,
    paper_rows,
    resolve_setting,
)
from zs3fast.evaluation.protocols import SETTINGS, published_items
from zs3fast.inference.predictors import squash
from zs3fast.inference.segmenter import Segmenter


def test_every_image_is_counted_once():
    dataset = ToyDataset()
    calls = []
    report = evaluate(toy_labels, dataset, progress=lambda done, total: calls.append((done, total)))
    expected = brute_force_table([(toy_labels(s.image), s.labels) for s in dataset.samples], 4)
    assert np.array_equal(report.table, expected) and report.table[:, -1].any()
    assert [item.id for item in report.items] == dataset.ids and report.images == 7 and report.seconds > 0
    assert calls == [(i + 1, 7) for i in range(7)]
    empty, some = report.items[0], report.items[3]
    assert (empty.iou, empty.pacc, empty.pixels) == (None, None, 0)
    target, prediction = dataset[3].labels, toy_labels(dataset[3].image)
    valid = target != 255
    union = [((target == c) | (prediction == c)) & valid for c in range(4)]
    hits = [(target == c) & (prediction == c) for c in range(4)]
    assert some.iou == pytest.approx(np.mean([100 * h.sum() / u.sum() for h, u in zip(hits, union) if u.any()]))
    assert some.pacc == pytest.approx(100 * sum(h.sum() for h in hits) / valid.sum()) and some.pixels == valid.sum()
    worst = report.worst(3)
    assert [item.iou for item in worst] == sorted(item.iou for item in report.items if item.iou is not None)[:3]
    assert len(report.worst(100)) == 6


def test_limit_and_workers_change_nothing_else():
    full, some = evaluate(toy_labels, ToyDataset()), evaluate(toy_labels, ToyDataset(), limit=4)
    assert some.items == full.items[:4]
    assert np.array_equal(evaluate(toy_labels, ToyDataset(), workers=1).table, full.table)
    assert evaluate(toy_labels, ToyDataset(), limit=100).items == full.items
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        evaluate(toy_labels, ToyDataset(), limit=0)
    with pytest.raises(ValueError, match="dataset: expected at least one image or pair, got none"):
        evaluate_pairs(toy_masks, ToyDataset(), [])


def test_pairs_are_counted_as_often_as_they_are_listed():
    dataset = ToyDataset()
    report = evaluate_pairs(toy_masks, dataset, PAIRS)
    expected = np.zeros((4, 4), int)
    for index, c in PAIRS:
        mask, target = toy_masks(dataset[index].image, [c])[0], dataset[index].labels
        valid = target != 255
        for column, part in enumerate((mask & (target == c), mask & (target != c), ~mask & (target == c))):
            expected[c, column] += (part & valid).sum()
        expected[c, 3] += (~mask & (target != c) & valid).sum()
    assert np.array_equal(report.table, expected)
    assert report.images == 5 and sum(item.times for item in report.items) == len(PAIRS)
    assert [(i.image, i.class_index, i.times) for i in report.items[:2]] == [(1, 2, 2), (1, 3, 1)]
    once = evaluate_pairs(toy_masks, dataset, PAIRS, limit=2)
    assert [(i.image, i.class_index) for i in once.items] == [(1, 2), (2, 0)]


def test_two_processes_find_the_same_bit_for_bit_and_go_on_from_one_that_died(tmp_path):
    """7 images: the shares differ. The first three were scored by a single process that then died."""

    def dies(image):
        if image.shape == ToyDataset()[3].image.shape:
            raise KeyboardInterrupt
        return toy_labels(image)

    partial = PartialResults(tmp_path / "partial", {"what": "toy"}, resume=False, every=0)
    with pytest.raises(KeyboardInterrupt):
        evaluate(dies, ToyDataset(), partial=partial)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path), 2), nprocs=2)
    one = both_reports()
    for rank in range(2):
        with open(tmp_path / f"{rank}.pickle", "rb") as file:
            assert same(pickle.load(file), one), rank
    names = sorted(path.name for path in (tmp_path / "partial").iterdir())
    assert names == ["part-0-0.npz", "part-1-0.npz", "part-1-1.npz"]
    assert same(both_reports(tmp_path / "partial", resume=True), one), "nothing is left to do, nothing counts twice"


def test_partial_results_of_other_settings_are_refused_or_replaced(tmp_path):
    make = lambda resume, **settings: PartialResults(tmp_path, settings, resume, every=0)  # noqa: E731
    evaluate(toy_labels, ToyDataset(), partial=make(False, weights="a", limit=None))
    with pytest.raises(ValueError, match=r"resume: .*part-0-0.npz was made with weights = 'a', this is 'b'"):
        evaluate(toy_labels, ToyDataset(), partial=make(True, weights="b", limit=None))
    partial = make(False, weights="b", limit=None)
    expected = evaluate(toy_labels, ToyDataset()).table
    assert np.array_equal(evaluate(toy_labels, ToyDataset(), partial=partial).table, expected)
    assert len(list(tmp_path.iterdir())) == 1
    partial.clear()
    assert not tmp_path.exists()


def test_errors_name_the_image():
    def wrong_size(image):
        return toy_labels(image)[1:]

    with pytest.raises(ValueError, match=r"image image0 of toy: prediction: expected the target's shape \[5, 9\]"):
        evaluate(wrong_size, ToyDataset())
    dataset = ToyDataset()
    dataset.samples[2] = Sample(dataset[2].image, dataset[2].labels + 400, "odd")
    with pytest.raises(ValueError, match="image odd of toy: target: expected labels 0..3 or 255"):
        evaluate(toy_labels, dataset)
    with pytest.raises(ValueError, match="image image1 of toy: segmenter_like: expected 2 masks, got 1"):
        evaluate_pairs(lambda image, classes: toy_masks(image, classes)[:1], ToyDataset(), PAIRS)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_its_own_error(workers):
    """A worker of a DataLoader would bury it in a traceback of several lines."""

    class Broken(ToyDataset):
        def __getitem__(self, index):
            if index == 1:
                raise ValueError("image: photo.jpg cannot be read")
            return super().__getitem__(index)

    with pytest.raises(ValueError, match="^image: photo.jpg cannot be read$"):
        evaluate(toy_labels, Broken(), workers=workers)


def test_settings_say_who_is_seen_and_what_is_scored():
    toy = ToyDataset()
    everything = tuple(range(4))
    for name, calibrated, seen in (
        ("inductive", tuple(SEEN), tuple(SEEN)),
        ("background-undifferentiated", tuple(SEEN), tuple(SEEN)),
        ("transductive", (), tuple(SEEN)),
        ("supervised", everything, tuple(SEEN)),
    ):
        got = resolve_setting(name, toy, NAMES)
        assert (got.name, got.calibrated, got.seen) == (name, calibrated, seen)
        assert bool(got.notes) == (name == "background-undifferentiated")
        with pytest.raises(ValueError, match=f"setting: {name} needs weights trained on the classes of toy"):
            resolve_setting(name, toy, ["other", "names"])
    assert resolve_setting(None, toy, NAMES).name == "inductive"
    for learned in ("inductive", "transductive", "supervised"):
        assert resolve_setting(None, toy, NAMES, learned) == resolve_setting(learned, toy, NAMES, learned)
        assert resolve_setting(None, toy, NAMES, learned).name == learned
        assert resolve_setting(None, toy, ["other"], learned).name == "cross-dataset"
    odd = resolve_setting("inductive", toy, NAMES, "supervised")
    assert odd.notes == ("inductive was asked for, but the weights look supervised: training saw all classes",)
    for name, learned, notes in (("inductive", "inductive", 0), ("background-undifferentiated", "inductive", 1)):
        assert len(resolve_setting(name, toy, NAMES, learned).notes) == notes
    cross = resolve_setting(None, toy, ["other"])
    assert cross == Setting("cross-dataset", (), None)
    assert "trained on the classes of toy itself" in resolve_setting("cross-dataset", toy, NAMES).notes[0]
    with pytest.raises(
        ValueError, match="setting: expected one of inductive, .*, got none, and the weights do not say"
    ):
        resolve_setting(None, toy, None)
    with pytest.raises(ValueError, match="setting: expected one of .*, got 'zero-shot'"):
        resolve_setting("zero-shot", toy, NAMES)
    toy.unseen = []
    with pytest.raises(
        ValueError, match="setting: expected a dataset with seen and unseen classes for inductive, got toy"
    ):
        resolve_setting("inductive", toy, None)
    assert resolve_setting(None, toy, NAMES).name == "cross-dataset"


def test_calibration_of_a_setting_reaches_the_model():
    """Inductive offsets the seen classes, transductive nothing: what a Segmenter gives for these `seen`."""
    model = tiny_model("tagclip", num_classes=4, seen=SEEN, class_names=NAMES, seen_offset=0.2)
    with torch.no_grad():
        model.decoder.layers[-1].multihead_attn.q.weight.mul_(30)
    rows = torch.nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    segmenter = Segmenter(model, text_embeddings=rows, class_names=NAMES)
    image = np.random.default_rng(0).integers(0, 256, (70, 64, 3), np.uint8)
    found = {}
    for name in ("inductive", "transductive", "supervised"):
        setting = resolve_setting(name, ToyDataset(), NAMES)
        found[name] = labeller(segmenter, NAMES, setting.calibrated)(image)
        assert np.array_equal(found[name], segmenter(image, NAMES, seen=setting.calibrated).labels)
    assert (found["inductive"] != found["transductive"]).any()
    assert (found["supervised"] != found["transductive"]).mean() < 0.01, "an equal offset moves rounding at most"


def test_clsclip_masks_are_its_scores_over_the_threshold():
    model = tiny_model("clsclip", num_classes=4, seen=SEEN, class_names=NAMES, nav_layers=[1, 2])
    text = torch.randn(4, model.embed_dim, generator=torch.Generator().manual_seed(1))
    image = np.random.default_rng(0).integers(0, 256, (40, 75, 3), np.uint8)
    masks = PairSegmenter(model, text)(image, [2, 0])
    assert masks.shape == (2, 40, 75) and masks.dtype == torch.bool
    with torch.no_grad():
        logits = model(squash(image, 64, model.pixel_mean, model.pixel_std)[None], text).mask_logits
    scores = torch.nn.functional.interpolate(logits, (40, 75), mode="bilinear", align_corners=False)[0].sigmoid()
    assert torch.equal(masks, (scores > 0.5)[[2, 0]]) and masks.any() and not masks.all()
    low = PairSegmenter(model, text, 0.01)(image, [2, 0])
    assert (low | ~masks).all() and low.sum() > 0
    with pytest.raises(ValueError, match="threshold: expected a number between 0 and 1, got 1.5"):
        PairSegmenter(model, text, 1.5)


def test_paper_rows_agree_with_themselves():
    """Published hIoU follow from S and U within rounding, but for the rows known not to."""
    from zs3fast.evaluation import PAPER_ROWS

    assert {row.setting for row in PAPER_ROWS} <= set(SETTINGS)
    assert len({(r.method, r.dataset, r.setting, r.source, r.detail) for r in PAPER_ROWS}) == len(PAPER_ROWS)
    names = set(evaluate(toy_labels, ToyDataset()).scores.headline())
    odd = []
    for row in PAPER_ROWS:
        assert set(row.values) <= names and all(0 < value < 100 for value in row.values.values()), row
        if "hIoU" in row.values:
            s, u = row.values["mIoU(S)"], row.values["mIoU(U)"]
            if abs(2 * s * u / (s + u) - row.values["hIoU"]) > 0.11:
                odd.append((row.method, row.dataset, row.setting))
    assert odd == [
        ("tagclip", "context60", "transductive"),
        ("maft", "ade847", "inductive"),
        ("maft", "voc20", "inductive"),  # ZSSeg alone: 69.4, its S and U give 70.7
    ]
    assert [row.values["hIoU"] for row in paper_rows("tagclip", "voc20", "inductive")] == [89.2]
    assert [row.detail for row in paper_rows("clsclip", "voc5i", "fold", 2)] == ["fold 2", "mean of the four folds"]
    assert paper_rows("clip_rc", "ade150", "inductive") == []
    assert published_items("voc20") == 1449 and published_items("voc5i", 2) == 725
    assert published_items("voc5i") is None and published_items("mine") is None
