"""bench/training.py on a toy network: what it searches, and that every part runs."""

from __future__ import annotations

from bench import training


def test_largest_batch_is_found_by_doubling_and_halving() -> None:
    for limit in (0, 1, 2, 5, 13, 64, 100):
        tried: list[int] = []

        def fits(batch: int, limit: int = limit, tried: list[int] = tried) -> int | None:
            tried.append(batch)
            return 1000 * batch if batch <= limit else None

        batch, peak = training.largest_batch(fits, most=64)
        assert batch == min(limit, 64) and peak == (1000 * batch or None)
        assert len(tried) <= 14 and max(tried) <= 64


def test_every_part_runs() -> None:
    options = ["--tiny", "--models", "tagclip", "--classes", "20", "--batch", "2", "--rounds", "1"]
    options += ["--most", "1", "--processes", "2"]
    rows = training.main(["largest", "scaling", *options, "--memory-gib", "4"])
    found = {row["backend"]: row["largest_batch"] for row in rows if row["pass"] == "largest batch"}
    assert found == {"official": 1, "zs3fast": 1, "zs3fast recompute": 1}
    scaling = [row for row in rows if row["pass"] == "scaling"]
    assert [row["processes"] for row in scaling] == [2]
    assert all(row["images_per_second"] > 0 and row["peak_mib"] > 0 for row in scaling)
