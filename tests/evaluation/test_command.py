"""`zs3fast eval` as a user meets it: weights and a folder of images in, a report out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.data.trees import folders
from tests.evaluation.toy import brute_force_table, voc_tree
from tests.tiny import tiny_model
from tests.tiny_clip import text_state, tiny_clip
from zs3fast import weights
from zs3fast.data import open_dataset, test_pairs
from zs3fast.evaluation import PairSegmenter
from zs3fast.evaluation.command import EPILOG, evaluate
from zs3fast.inference.segmenter import Segmenter
from zs3fast.proposals import FileMaskProposer
from zs3fast.text import class_names, seen_classes

DATA = os.environ.get("ZS3FAST_DATA")
VOC = class_names("voc20")
app = typer.Typer(pretty_exceptions_enable=False)
app.command(epilog=EPILOG)(evaluate)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to be in, with its own cache."""
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tree(place):
    """VOC-shaped images, tiny weights that know VOC's classes, and rows for them."""
    voc_tree(place)
    model = tiny_model("tagclip", class_names=VOC, num_classes=20, seen=seen_classes("voc20"))
    with torch.no_grad():  # spread the mask logits: scores of a fresh model are all about one half
        model.decoder.layers[-1].multihead_attn.q.weight.mul_(30)
    weights.save(model, place / "tiny.safetensors")
    rows = torch.nn.functional.normalize(torch.randn(20, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    np.save(place / "rows.npy", rows.numpy())
    return place


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def common(**changes):
    options = {"weights": "tiny.safetensors", "dataset": "voc20", "data": ".", "text-embeddings": "rows.npy"}
    return [part for name, value in (options | changes).items() if value is not None for part in (f"--{name}", value)]


def report(folder="zs3fast_eval"):
    return json.loads((Path(folder) / "report.json").read_text())


def test_scores_are_those_of_the_segmenter_counted_by_hand(tree):
    output = run(*common())
    found = report()
    model, _ = weights.load("tiny.safetensors")
    segmenter = Segmenter(model, text_embeddings=np.load("rows.npy"), class_names=VOC)
    data = open_dataset("voc20", tree, "val")
    pairs = [(segmenter(s.image, VOC, seen=range(15)).labels, s.labels) for s in (data[i] for i in range(len(data)))]
    table = brute_force_table(pairs, 20)
    assert np.array_equal(np.load("zs3fast_eval/counts.npy"), table) and len(np.unique(pairs[0][0])) > 1
    assert found["scores"]["pacc"] == pytest.approx(100 * table.diagonal().sum() / table.sum())
    assert found["setting"] == "inductive" and found["images"] == 3 and found["split"] == "val"
    assert found["published"][0]["values"]["hIoU"] == 89.2
    note = "scored 3 images, the published test set has 1449: not comparable"
    assert note in output and found["notes"] == [note]
    assert "voc20 val, inductive: 3 images, percent" in output and "96.1" in output and "tvmonitor *" in output
    assert f"{found['scores']['pacc']:.2f}" in output
    assert sorted(path.name for path in Path("zs3fast_eval").iterdir()) == [
        "confusion.png",
        "counts.npy",
        "report.html",
        "report.json",
    ]


def test_settings_limit_split_and_denominator(tree):
    run(*common(limit=2, setting="transductive", denominator="gt", output="out", worst=0))
    found = report("out")
    assert found["images"] == 2 and found["setting"] == "transductive" and found["settings"]["denominator"] == "gt"
    assert found["settings"]["method"] == "tagclip" and found["settings"]["text"] == "rows.npy"
    run(*common(setting="cross-dataset", output="cross"))
    crossed = report("cross")
    assert crossed["scores"]["hiou"] is None and crossed["scores"]["miou"] is not None
    assert any("trained on the classes of voc20 itself" in note for note in crossed["notes"])


def test_an_image_tower_in_8_bits(tree):
    """Its counts are its own, the weights' name and digest those of the file."""
    pytest.importorskip("torchao", reason="needs torchao (pip install 'zs3fast[quantize]')")
    run(*common(output="float", worst=0))
    run(*common(output="int8", worst=0, quantize="int8"))
    settings = report("int8")["settings"]
    assert settings.pop("quantize") == "int8" and settings == report("float")["settings"]
    segmenter = Segmenter.from_pretrained(
        tree / "tiny.safetensors", text_embeddings=np.load("rows.npy"), class_names=VOC, quantize="int8"
    )
    data = open_dataset("voc20", tree, "val")
    pairs = [(segmenter(s.image, VOC, seen=range(15)).labels, s.labels) for s in (data[i] for i in range(len(data)))]
    assert np.array_equal(np.load("int8/counts.npy"), brute_force_table(pairs, 20))


def test_the_setting_is_that_of_the_weights(tree):
    names = {"class_names": VOC, "num_classes": 20}
    weights.save(tiny_model("zegclip", **names, seen=range(20)), "supervised.safetensors")
    weights.save(
        tiny_model("zegclip", **names, seen=seen_classes("voc20"), seen_offset=0.0), "transductive.safetensors"
    )
    for name in ("supervised", "transductive"):
        run(*common(weights=f"{name}.safetensors", limit=1, worst=0))
        assert report()["setting"] == name and len(report()["notes"]) == 1
    output = run(*common(weights="supervised.safetensors", limit=1, worst=0, setting="inductive"))
    assert report()["setting"] == "inductive" and "inductive was asked for, but the weights look supervised" in output


def test_tagclip_crosses_over_without_its_token(tree):
    """The published configurations leave token and weighting out."""
    run(*common(setting="cross-dataset"))
    assert "cross-dataset: the trusty token is left out, as published" in report()["notes"]
    model, _ = weights.load("tiny.safetensors")
    tables = {}
    for token in (True, False):
        if not token:
            model.trusty_token, model.trusty_weighting = None, "off"
        segmenter = Segmenter(model, text_embeddings=np.load("rows.npy"), class_names=VOC)
        data = open_dataset("voc20", tree, "val")
        pairs = [(segmenter(data[i].image, VOC, seen=range(20)).labels, data[i].labels) for i in range(len(data))]
        tables[token] = brute_force_table(pairs, 20)
    counts = np.load("zs3fast_eval/counts.npy")
    assert np.array_equal(counts, tables[False]) and not np.array_equal(counts, tables[True])


def test_names_of_a_dataset_are_whole_lines(place):
    """ADE20K-847 has classes that share their first name."""
    lines = [f"thing {c}, object {c}" for c in range(847)]
    lines[3:5] = "screen, silver screen", "screen, crt screen"
    folders(
        place / "ADE20K_2021_17_01", "images/validation", "annotations_detectron2/validation",
        {"a": np.full((40, 48), 4, np.uint16)}, ".tif",
    )  # fmt: skip
    Path("ADE20K_2021_17_01/class_names.txt").write_text("\n".join(lines))
    model = tiny_model("zegclip", class_names=lines, num_classes=847, seen=range(5))
    weights.save(model, "named.safetensors", text_state(tiny_clip(), "text_encoder."))
    run(
        *common(weights="named.safetensors", dataset="ade847", **{"text-embeddings": None}),
        "--setting",
        "cross-dataset",
    )
    assert len(report()["classes"]) >= 1 and report()["images"] == 1
    segmenter = Segmenter.from_pretrained("named.safetensors")
    assert segmenter.classes[3:5] == [(lines[3],), (lines[4],)]


def test_official_weights_need_to_be_told_their_vocabulary(tree):
    from zs3fast.weights.official import official_keys

    state = {official: value for value, official in zip(*_official(tree, official_keys))}
    torch.save({"state_dict": state}, "official.pth")
    options = common(weights="official.pth")
    assert "setting: expected one of" in run(*options, code=2)
    run(*options, "--trained-on", "voc20")
    assert report()["setting"] == "inductive" and report()["settings"]["weights"].startswith("official.pth, ")


def _official(tree, official_keys):
    model, _ = weights.load(tree / "tiny.safetensors")
    names = official_keys(model)
    return [model.state_dict()[name] for name in names], [names[name] for name in names]


def test_torchrun_scores_each_image_once(tree):
    """Three images over two processes; the report is that of one process."""
    (tree / "evaluate.py").write_text(
        "import typer\nfrom zs3fast.evaluation.command import evaluate\ntyper.run(evaluate)\n"
    )
    run(*common(output="one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "evaluate.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *common(output="two")], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 images in") == 1, "one process talks"
    one, two = report("one"), report("two")
    del one["seconds"], two["seconds"]
    assert one == two
    assert Path("one/counts.npy").read_bytes() == Path("two/counts.npy").read_bytes()
    assert Path("one/confusion.png").read_bytes() == Path("two/confusion.png").read_bytes()


def test_an_interrupted_evaluation_goes_on(tree, monkeypatch):
    from zs3fast.evaluation.partial import PartialResults

    run(*common(output="whole"))
    plain = PartialResults.__init__
    monkeypatch.setattr(PartialResults, "__init__", lambda self, *args: plain(self, *args, every=0))
    seen = []
    call = Segmenter.__call__

    def interrupted(self, *args, **options):
        seen.append(args)
        if len(seen) == 3:
            raise OSError("the disk is gone")
        return call(self, *args, **options)

    monkeypatch.setattr(Segmenter, "__call__", interrupted)
    assert run(*common(output="out"), code=1) == "error the disk is gone"
    assert [path.name for path in Path("out/partial").iterdir()] == ["part-0-0.npz"]
    assert "was made with limit = None, this is 2" in run(*common(output="out", limit=2), "--resume", code=1)
    mine, rows, listing = Path("tiny.safetensors"), Path("rows.npy"), Path("VOC2012/ImageSets/Segmentation/val.txt")
    model, _ = weights.load(mine)
    for path, change in (  # of the same name and size
        (mine, lambda: weights.save(model, mine)),
        (rows, lambda: np.save(rows, -np.load(rows))),
        (listing, lambda: listing.write_text("\n".join(reversed(listing.read_text().split())) + "\n")),
    ):
        before = path.read_bytes()
        with torch.no_grad():
            model.decoder.layers[0].multihead_attn.q.weight.neg_()
        change()
        assert len(path.read_bytes()) == len(before) and path.read_bytes() != before
        assert "_sha256 = " in run(*common(output="out"), "--resume", code=1)
        path.write_bytes(before)
    run(*common(output="out", worst=0), "--resume")
    assert len(seen) == 4, "two before, one after: the third is new"
    whole, out = report("whole"), report("out")
    assert whole["scores"] == out["scores"] and whole["items"] == out["items"] and not Path("out/partial").exists()


def test_folds_of_pairs(tree):
    """ClsCLIP on PASCAL-5i: only the fold's classes are asked for, and FB-IoU is reported."""
    model = tiny_model("clsclip", class_names=VOC, num_classes=20, seen=list(range(15)), nav_layers=[1, 2])
    weights.save(model, "clsclip.safetensors")
    np.save("tokens.npy", np.random.default_rng(0).standard_normal((20, model.embed_dim), np.float32))
    options = common(weights="clsclip.safetensors", dataset="voc5i", **{"text-embeddings": "tokens.npy"})
    assert "fold: expected 0..3, as voc5i is tested fold by fold" in run(*options, code=2)
    model.seen = range(15, 20)  # which these weights call pottedplant, ..., tvmonitor
    weights.save(model, "leak.safetensors")
    leaked = "potted plant, sheep, sofa, train, tv monitor"
    note = f"fold 3 holds out what the weights saw in training: {leaked}: not zero-shot"
    assert note in run(*options, "--weights", "leak.safetensors", "--fold", 3, "-o", "leak")
    model.seen = range(15)
    output = run(*options, "--fold", 3, "--episodes", 50)
    found = report()
    assert found["setting"] == "fold" and set(found["scores"]) == {"miou", "fb_iou"}
    assert {row["name"] for row in found["classes"]} <= set(
        open_dataset("voc5i", tree, "val", fold=3).class_names[15:20]
    )
    assert sum(item["times"] for item in found["items"]) == 50
    assert [row["values"] for row in found["published"]] == [{"mIoU": 54.1}, {"mIoU": 56.4, "FB-IoU": 67.9}]
    assert "fold 3" in output and not Path("zs3fast_eval/confusion.png").exists()
    run(*options, "--fold", 3, "--eval-size", "input", "-o", "input")
    small, data = report("input"), open_dataset("voc5i", tree, "val", fold=3)
    assert small["settings"]["eval_size"] == "input" and "eval_size" not in found["settings"]
    assert "scored at the network's input size, label maps shrunk to it, as few-shot code does" in small["notes"]
    segmenter = PairSegmenter(model, torch.from_numpy(np.load("tokens.npy")), size=(64, 64))
    counts = np.zeros((21, 4), np.int64)
    for index, asked in test_pairs(data, data.unseen):
        rows = np.arange(64) * np.array(data[index].labels.shape)[:, None] // 64
        truth = data[index].labels[np.ix_(*rows)]
        mask = segmenter(data[index].image, [asked])[0].numpy()[truth != 255]
        truth = truth[truth != 255] == asked
        counts[asked] += [(p & t).sum() for p, t in ((mask, truth), (mask, ~truth), (~mask, truth), (~mask, ~truth))]
    assert np.array_equal(np.load("input/counts.npy"), counts)
    weights.save(model, "clsclip.safetensors", text_state(tiny_clip(), "text_encoder."))
    run(
        *common(weights="clsclip.safetensors", dataset="voc5i", **{"text-embeddings": None}), "--fold", 3, "-o", "tower"
    )
    assert report("tower")["settings"]["text"] == "a photo of a {}."
    boxes = [{"file_name": f"2007_00000{i}.jpg", "boxes": [{"box": [0, 0, 30, 30], "name": "sheep"}]} for i in range(3)]
    Path("boxes.json").write_text(json.dumps({"pictures": boxes}))
    run(*options, "--fold", 3, "--boxes", "files:boxes.json", "--no-box", "empty", "-o", "plus")
    plus, data = report("plus"), open_dataset("voc5i", tree, "val", fold=3)
    assert plus["settings"]["method"] == "clsclip+" and plus["published"][0]["values"]["mIoU"] == 71.5
    assert plus["notes"] == [
        f"scored {len(plus['items'])} pairs, the published test set has 346: not comparable",
        "boxes come from a detector: if it was trained on the asked classes, this is not zero-shot",
    ]
    rows = {row["name"]: row for row in plus["classes"]}
    assert all(rows[name]["tp"] == rows[name]["fp"] == 0 for name in rows if name != "sheep"), "no boxes, nothing found"
    zoom = (np.s_[:33, :33], 16)  # the box and its margin of a tenth
    inside = sum((data[i].labels[zoom[0]] == zoom[1]).sum() for i in range(3))
    assert 0 < rows["sheep"]["tp"] + rows["sheep"]["fp"] <= 3 * 33 * 33 and rows["sheep"]["tp"] <= inside
    for more, message in (
        (("--episodes", "many"), "episodes: expected all or a number, got 'many'"),
        (("--setting", "inductive"), "setting: expected none for a fold of voc5i, which has its own, got 'inductive'"),
        (("--threshold", "2"), "Invalid value for '--threshold'"),
        (("--eval-size", "half"), "--eval-size: expected one of original, input, got 'half'"),
        (
            ("--eval-size", "input", "--boxes", "files:boxes.json"),
            "--eval-size: expected a fold without boxes for input",
        ),
        (("--weights", "tiny.safetensors", "--text-embeddings", "rows.npy"), "weights: expected clsclip's for voc5i"),
    ):
        assert message in run(*options, "--fold", 3, *more, code=2)


def test_maft_takes_its_proposals_from_files_by_the_names_of_the_pictures(tree):
    model = tiny_model("maft", class_names=VOC, num_classes=20, seen=seen_classes("voc20"))
    weights.save(model, "maft.safetensors")
    options = common(weights="maft.safetensors", limit=2, worst=1)
    assert "proposer: maft classifies regions" in run(*options, code=2)
    folder = tree / "VOC2012/SegmentationClass"  # the true regions, by number
    run(*options, "--proposer", f"files:{folder}")
    rows = np.load("rows.npy")
    data = open_dataset("voc20", tree, "val")
    segmenter = Segmenter(model, text_embeddings=rows, class_names=VOC, proposer=FileMaskProposer(folder))
    pairs = [(segmenter(data.image_path(i), VOC, seen=range(15)).labels, data[i].labels) for i in range(2)]
    assert np.array_equal(np.load("zs3fast_eval/counts.npy"), brute_force_table(pairs, 20))
    assert report()["settings"]["proposer"] == f"files:{folder}" and "crops" not in report()["settings"]
    run(*options, "--proposer", f"files:{folder}", "--crops", "mask_crop", "--output", "cropped")
    segmenter = Segmenter(
        model, text_embeddings=rows, class_names=VOC, proposer=FileMaskProposer(folder), crops="mask_crop"
    )
    cut = [(segmenter(data.image_path(i), VOC, seen=range(15)).labels, data[i].labels) for i in range(2)]
    assert not all(np.array_equal(a, b) for (a, _), (b, _) in zip(pairs, cut, strict=True))
    assert np.array_equal(np.load("cropped/counts.npy"), brute_force_table(cut, 20))
    assert report("cropped")["settings"]["crops"] == "mask_crop"
    refused = run(*options, "--proposer", f"files:{folder}", "--crops", "cut", "--output", "no", code=2)
    assert "crops: expected one of mask, crop, mask_crop, got 'cut'" in refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": "absent.safetensors"}, "--weights: no file absent.safetensors"),
        ({"dataset": "voc"}, "--dataset: expected one of"),
        ({"data": "elsewhere"}, "elsewhere"),
        ({"split": "test"}, "split: expected train or val, got 'test'"),
        ({"setting": "zero-shot"}, "setting: expected one of inductive"),
        ({"denominator": "all"}, "denominator: expected one of gt_or_pred, gt, got 'all'"),
        ({"fold": 1}, "fold: expected one of voc5i and coco20i, which have folds, got voc20"),
        ({"quantize": "int4"}, "quantize: expected one of int8, int8-weights, fp8, got 'int4'"),
        ({"eval-size": "input"}, "--eval-size: expected a fold without boxes for input"),
        ({"boxes": "files:boxes.json"}, "boxes: expected a fold of voc5i and coco20i, got voc20"),
        ({"worst": -1}, "worst: expected at least 0, got -1"),
        ({"device": "tpu9"}, "device: 'tpu9' cannot be used here"),
        ({"trained-on": "voc20"}, "--trained-on: expected an official checkpoint"),
        ({"text-embeddings": "absent.npy"}, "--text-embeddings: no file absent.npy"),
    ],
)
def test_mistakes_are_one_line_before_the_first_image(tree, changes, message):
    output = run(*common(**changes), code=2)
    assert output.startswith("error ") and message in output and not Path("zs3fast_eval").exists()


def test_a_broken_picture_ends_the_run_and_is_named(tree):
    (tree / "VOC2012/JPEGImages/2007_000001.jpg").write_bytes(b"no image")
    output = run(*common(), code=1)
    assert "2007_000001.jpg is not an image" in output and not Path("zs3fast_eval/report.json").exists()


@pytest.mark.skipif(DATA is None, reason="needs real VOC images: set ZS3FAST_DATA to a folder with VOCdevkit")
def test_real_pictures(tree):
    run(*common(data=Path(DATA) / "VOCdevkit", limit=3, worst=1))
    found = report()
    assert found["images"] == 3 and found["scores"]["pacc"] is not None
    table = np.load("zs3fast_eval/counts.npy")
    data = open_dataset("voc20", Path(DATA) / "VOCdevkit", "val")
    truth = np.concatenate([data[i].labels.ravel() for i in range(3)])
    assert np.array_equal(table.sum(1), np.bincount(truth[truth != 255], minlength=20)), "every labelled pixel, once"
