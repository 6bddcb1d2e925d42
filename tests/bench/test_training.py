"""bench/training.py on a toy network: every part runs."""

from __future__ import annotations

from bench import training


def test_every_part_runs() -> None:
    options = ["--tiny", "--models", "tagclip", "--classes", "20", "--batch", "2", "--rounds", "1"]
    options += ["--most", "1", "--processes", "2"]
    rows = training.main(["largest", "step", "scaling", "activations", *options, "--memory-gib", "4", "--compile"])
    found = {row["backend"]: row["largest_batch"] for row in rows if row["pass"] == "largest batch"}
    assert found == {"official": 1, "zs3fast": 1, "zs3fast recompute": 1}
    steps = [row["backend"] for row in rows if row["pass"] == "step"]
    assert steps == [f"zs3fast{way}, 1 process" for way in ("", " recompute", " compiled")]
    scaling = [row for row in rows if row["pass"] == "scaling"]
    assert [row["processes"] for row in scaling] == [2]
    timed = [row for row in rows if row["pass"] in ("step", "scaling")]
    assert all(row["images_per_second"] > 0 and row["peak_mib"] > 0 for row in timed)
    kept = {row["backend"]: row["peak_mib"] for row in rows if row["pass"] == "activations"}
    assert kept.keys() == {"official", "zs3fast"} and 0 < kept["zs3fast"] < kept["official"]
