"""The folder benchmark runs end to end, checks what is written and says what it measured."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from bench import harness
from bench.folder import check_labels, main


def test_it_runs(tmp_path):
    out = tmp_path / "folder.json"
    options = ["--tiny", "--classes", "5", "--threads", "1", "--pictures", "3", "--size", "40", "56", "--rounds", "1"]
    rows = main([*options, "--workers", "0", "2", "--batch-size", "1", "2", "--json", str(out)])
    assert [row["backend"] for row in rows] == [
        "sequential",
        "0 workers, batch 1",
        "2 workers, batch 1",
        "0 workers, batch 2",
        "2 workers, batch 2",
    ]
    assert all(row["images_per_second"] > 0 and row["pass"] == "folder" for row in rows)
    assert {row["shape"] for row in rows} == {"c5-64-B1, 40 x 56"}
    assert json.loads(out.read_text())["rows"] == rows


def test_other_labels_are_not_timed(tmp_path):
    expected, got = tmp_path / "expected", tmp_path / "got"
    expected.mkdir()
    Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10)).save(expected / "x_labels.png")
    shutil.copytree(expected, got)
    check_labels([tmp_path / "x.jpg"], expected, got)
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(got / "x_labels.png")
    with pytest.raises(harness.OverBudget, match="labels of x.jpg"):
        check_labels([tmp_path / "x.jpg"], expected, got)
