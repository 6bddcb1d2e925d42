"""The data benchmark runs end to end and says what it measured."""

from __future__ import annotations

import json

from bench.data import main


def test_it_runs(tmp_path):
    out = tmp_path / "data.json"
    options = [
        "--recipes",
        "decode",
        "clsclip",
        "--workers",
        "0",
        "1",
        "--images",
        "4",
        "--batch",
        "2",
        "--rounds",
        "1",
    ]
    rows = main([*options, "--pictures", "3", "--size", "40", "56", "--json", str(out)])
    assert [(row["name"], row["workers"]) for row in rows] == [
        ("decode", 0),
        ("decode", 1),
        ("clsclip", 0),
        ("clsclip", 1),
    ]
    assert all(row["images_per_second"] > 0 and row["shape"] == "made 40 x 56" for row in rows)
    assert json.loads(out.read_text())["rows"] == rows
