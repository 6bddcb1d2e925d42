"""`zs3fast eval` of methods that need CLIP's weights alone, by their published protocols."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.evaluation.toy import voc_tree
from zs3fast.data import open_dataset
from zs3fast.evaluation.command import EPILOG, evaluate
from zs3fast.evaluation.paper_rows import PAPER_ROWS, paper_rows
from zs3fast.inference.segmenter import Segmenter
from zs3fast.inference.window_protocols import window_protocol
from zs3fast.models.registry import create_model
from zs3fast.text import competing_names

app = typer.Typer(pretty_exceptions_enable=False)
app.command(epilog=EPILOG)(evaluate)
CLIP = "ViT-S-32-alt"


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(open_clip.create_model(CLIP, load_weights=False).state_dict(), path)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to be in, with its own cache and a few labelled images."""
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    voc_tree(tmp_path)
    return tmp_path


def test_a_row_needs_method_protocol_and_dataset(place, weights) -> None:
    common = ("--dataset", "voc21", "--data", place, "--clip", CLIP, "--pretrained", weights, "--limit", 2)
    output = run("--method", "sclip", "--protocol", "sclip", *common, "--templates", "single", "--worst", 0)
    assert "59.63" in output and "59.1" in output, "the published rows stand beside it"
    report = json.loads(Path("zs3fast_eval/report.json").read_text())
    assert report["setting"] == "training-free"
    settings = report["settings"]
    assert (settings["method"], settings["protocol"], settings["prob_thd"]) == ("sclip", "sclip", 0.1)
    assert (settings["logit_scale"], settings["area_thd"], settings["merge"]) == (65.0, 0.1, "max")
    model = create_model("sclip", clip=CLIP, pretrained=str(weights))
    seg = Segmenter(model, templates="single", dtype="float32", protocol=window_protocol("sclip", "voc21"))  # as eval
    images, table = open_dataset("voc21", place, "val"), np.zeros((21, 21), int)
    for index in range(2):
        sample = images[index]
        labels = seg(sample.image, competing_names("voc21")).labels
        kept = sample.labels != 255
        np.add.at(table, (sample.labels[kept], labels[kept]), 1)
    counts = np.load("zs3fast_eval/counts.npy")
    assert counts.sum() == table.sum() and np.array_equal(counts[: table.shape[0], : table.shape[1]], table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "weights: expected a weight file, or a method and pretrained weights of CLIP's own"),
        (("--pretrained", "x.pt", "--method", "zegclip"), "got 'x.pt'"),
        (("--pretrained", "x.pt", "--protocol", "sclp"), "protocol: expected one of"),
        (("--weights", "zs3fast-tiny", "--method", "sclip"), "method: is for CLIP's weights alone"),
    ],
)
def test_mistakes_are_one_line(place, options, message) -> None:
    assert message in run("--dataset", "voc20", "--data", place, *options, code=2)


def test_trained_methods_need_their_weights(place, weights) -> None:
    options = ("--dataset", "voc20", "--data", place, "--clip", CLIP, "--pretrained", weights)
    assert "weights: expected a file for zegclip, which is trained, got none" in run(
        "--method", "zegclip", *options, code=2
    )


def test_rows_of_the_published_table() -> None:
    def values(method: str, dataset: str) -> list[float]:
        return [row.values["mIoU"] for row in paper_rows(method, dataset, "training-free")]

    assert values("sclip", "voc21") == [59.1, 59.63] and values("scclip", "cityscapes") == [41.0]
    assert values("naclip", "ade150") == [17.4, 19.05, 19.1] and values("maskclip", "coco_object") == [26.9]
    assert values("rcs", "voc20") == [85.5, 86.0, 82.3] and values("clearclip", "context60") == [32.6]
    mine = [row for row in PAPER_ROWS if row.setting == "training-free"]
    averages = {("scclip", ""): 43.9, ("naclip", "PAMR off"): 39.4, ("sclip", "paper"): 38.2, ("clearclip", ""): 38.1}
    for (method, detail), mean in averages.items():
        rows = [r for r in mine if (r.method, r.detail) == (method, detail) and "TF-OVOS" not in r.source]
        assert len(rows) == 8 and abs(sum(r.values["mIoU"] for r in rows) / 8 - mean) < 0.06
