"""Reports as files: JSON that parses, HTML that is whole and escaped, images that show what was counted."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.evaluation.toy import NAMES, PAIRS, SEEN, ToyDataset, toy_labels, toy_masks
from zs3fast.evaluation import PaperRow, evaluate, evaluate_pairs, worst_images, write_report
from zs3fast.evaluation.drawing import confusion_image, panels
from zs3fast.evaluation.summary import class_table, score_table

ROW = PaperRow("zegclip", "toy", "inductive", {"pAcc": 95.0, "hIoU": 84.3}, "A paper & more", "from <here>")
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags that close in order, the text, and the sources of images."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.sources, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag == "img":
            self.sources.append(dict(attributes)["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_files_of_a_report(tmp_path):
    dataset = ToyDataset()
    report = evaluate(toy_labels, dataset, settings={"method": "zegclip", "weights": "a.safetensors"})
    report = replace(report, notes=("not & comparable",))
    worst = worst_images(report, dataset, lambda image, item: toy_labels(image), 2)
    files = write_report(report, [ROW], worst, tmp_path / "new")
    assert sorted(path.name for path in files) == ["confusion.png", "counts.npy", "report.html", "report.json"]
    assert sorted(files) == sorted((tmp_path / "new").iterdir()), "and no temporary files"

    content = json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8"))
    assert content["scores"]["hiou"] == report.scores.hiou, "full precision"
    assert content["classes"][2] == {
        "index": 2,
        "name": "sofa",
        "group": "unseen",
        "iou": report.scores.iou[2],
        "accuracy": report.scores.accuracy[2],
        "truth_pixels": int(report.table[2].sum()),
        "predicted_pixels": int(report.table[:, 2].sum()),
    }
    assert [item["id"] for item in content["items"]] == dataset.ids and content["items"][0]["iou"] is None
    assert content["published"][0]["values"] == ROW.values and content["notes"] == ["not & comparable"]
    assert content["settings"] == {"denominator": "gt_or_pred", "limit": None, **report.settings}
    assert np.array_equal(np.load(tmp_path / "new" / "counts.npy"), report.table)

    page = Page((tmp_path / "new" / "report.html").read_text(encoding="utf-8"))
    text = " ".join(page.text)
    for expected in (f"{report.scores.hiou:.2f}", "84.3", "from <here>", "A paper & more", worst[0].item.id, *NAMES):
        assert expected in text, expected
    assert "script" not in page.tags and "link" not in page.tags
    assert len(page.sources) == 1 + 2 * 4
    for source in page.sources:
        head, _, encoded = source.partition(";base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert head == f"data:image/{picture.format.lower()}"
        picture.load()


def test_hostile_names_stay_text(tmp_path):
    dataset = ToyDataset()
    nasty = '<script>alert("x")</script>'
    dataset.class_names = [nasty, "a & b", "[red]rich[/]", "it's"]
    dataset.samples = [replace(s, id=f"{nasty}{i}") for i, s in enumerate(dataset.samples)]
    report = evaluate(toy_labels, dataset, settings={nasty: nasty, "method": nasty})
    worst = worst_images(report, dataset, lambda image, item: toy_labels(image), 3)
    write_report(report, [], worst, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text and nasty in " ".join(page.text)
    assert all(name in " ".join(page.text) for name in dataset.class_names)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(class_table(report), score_table(report, []))
    assert "[red]rich[/]" in console.export_text()


def test_reports_of_pairs_have_the_asked_classes_and_no_confusion(tmp_path):
    dataset = ToyDataset()
    pairs = [pair for pair in PAIRS if pair[1] != 3]
    report = evaluate_pairs(toy_masks, dataset, pairs, settings={"method": "clsclip"})

    def shown(image, item):
        return np.where(toy_masks(image, [item.class_index])[0], item.class_index, -1)

    worst = worst_images(report, dataset, shown, 2)
    assert all({index for index, _, _ in image.classes} == {image.item.class_index} for image in worst)
    files = write_report(report, [], worst, tmp_path)
    assert sorted(path.name for path in files) == ["counts.npy", "report.html", "report.json"]
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["scores"] == {"miou": report.scores.miou, "fb_iou": report.scores.fb_iou}
    assert [row["name"] for row in content["classes"]] == ["cat", "dog", "sofa"]
    assert content["classes"][0]["tp"] == report.table[0, 0] and content["setting"] == "fold"
    assert "FB-IoU" in " ".join(Page((tmp_path / "report.html").read_text()).text)


def test_tables_show_ours_beside_the_published_with_two_decimals():
    report = evaluate(toy_labels, ToyDataset(), settings={"method": "zegclip"})
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(score_table(report, [ROW]), class_table(report))
    lines = console.export_text().splitlines()
    ours = next(line for line in lines if "this run" in line)
    paper = next(line for line in lines if "A paper & more, from <here>" in line)
    assert f"{report.scores.pacc:.2f}" in ours and f"{report.scores.miou_unseen:.2f}" in ours
    assert "95.0" in paper and "84.3" in paper and "-" in paper
    assert any("sofa *" in line and f"{report.scores.iou[2]:.2f}" in line for line in lines)
    assert all(any(name in line for line in lines) for name in NAMES)


@pytest.mark.parametrize("classes", [1, 20, 60, 171, 847])
def test_confusion_picture_draws_every_cell(classes):
    table = np.zeros((classes, classes + 1), np.int64)
    table[0, 0] = 3
    if classes > 1:
        table[1, 0] = table[1, 1] = 5
    picture = confusion_image(table, [f"class {i}" for i in range(classes)], range(classes // 2))
    pixels = np.asarray(picture)
    cell = 34 if classes <= 24 else 18 if classes <= 60 else 12 if classes <= 171 else 3
    assert (pixels == (23, 92, 156)).all(-1).sum() >= cell * cell // 2, "the first row is right throughout"
    grey, expected = (pixels == 225).all(-1).sum(), max(classes - 2, 0) * classes * cell * cell
    assert expected <= grey < expected + 1000, "rows without a pixel, and a little of the letters' edges"
    if classes > 1:
        half = (255 + np.sqrt(0.5) * (np.array([196, 62, 18]) - 255)).round()
        assert (pixels == half).all(-1).sum() >= cell * cell // 2, "half of the second row is wrong"


def test_panels_show_mistakes_but_not_where_nothing_is_scored():
    image = np.full((40, 80, 3), 128, np.uint8)
    truth, prediction, ignored = np.zeros((40, 80), int), np.zeros((40, 80), int), np.zeros((40, 80), bool)
    prediction[:, 40:] = 1
    truth[20:], ignored[20:] = -1, True
    photo, said, seen, mistakes = (
        np.asarray(panel) for panel in panels(image, truth, prediction, ignored, 2, side=160)
    )
    assert photo.shape == (80, 160, 3) and (photo == 128).all()
    red = mistakes[..., 0] > mistakes[..., 1].astype(int) + 50
    assert red[:40, 80:].all() and not red[:, :80].any() and not red[40:].any()
    assert (said[40:] == 128).all() and (said[0, 0] == seen[0, 0]).all() and (seen[0, 0] != seen[0, 159]).any()


def test_worst_images_are_segmented_again_as_they_were():
    dataset = ToyDataset()
    report = evaluate(toy_labels, dataset)
    first = worst_images(report, dataset, lambda image, item: toy_labels(image), 1)[0]
    item = report.worst(1)[0]
    assert first.item == item and [panel.size for panel in first.panels] == [first.panels[0].size] * 4
    sample = dataset[item.image]
    for index, truth, predicted in first.classes:
        assert truth == (sample.labels == index).sum() and predicted == (toy_labels(sample.image) == index).sum()
    assert SEEN == list(report.setting.seen)


def test_tables_fit_80_columns_and_cut_no_word() -> None:
    report = evaluate(toy_labels, ToyDataset(), settings={"method": "clip_rc"})
    rows = [replace(ROW, method="a method of two words", source="CVPR 2024, table 12")]
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(score_table(report, rows), class_table(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for name in ("clip_rc", "this run", "a method", "FB-IoU", *report.scores.headline()):
        assert name in text
