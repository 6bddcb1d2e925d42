"""Numbers in Markdown come from results files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import harness, report
from bench.harness import Timing


def write(folder: Path) -> None:
    described = {"device": "Some CPU", "versions": {"torch": "2.10"}, "commit": "0123456789abcdef-dirty", "threads": 2}
    described["isa"] = "AVX2"
    rows = [
        harness.row("zegclip", "zs3fast", "voc20-512-B1", Timing([1.2]), described=described, call_mib=3.25,
                    import_s=1.0, load_s=2.0, first_call_s=3.0, peak_bytes=2**30, floor="encoder"),
        harness.row("clip_rc", "zs3fast", "voc20-512-B1", Timing([1.8]), described=described, floor="encoder M=16"),
        harness.row("encoder", "floor: products", "voc20-512-B1", Timing([1.0]), described=described, floor="encoder"),
        harness.row("encoder M=16", "floor: products", "voc20-512-B1", Timing([1.5]), described=described,
                    floor="encoder M=16"),
        harness.row("clip_rc M=256", "official eager", "coco171-512-B1", None, described=described,
                    outcome="does not fit in 18.0 GiB"),
    ]  # fmt: skip
    harness.write_results(folder / "some-cpu" / "models.json", rows)


def test_tables_are_filled_from_the_results_file(tmp_path):
    write(tmp_path)
    before = "# Speed\n\n<!-- bench:some-cpu/models -->\nold\n<!-- /bench -->\n\nafter\n"
    after = report.fill(before, tmp_path)
    assert after.startswith("# Speed\n\n<!-- bench:some-cpu/models -->\n| shape |") and after.endswith(
        "<!-- /bench -->\n\nafter\n"
    )
    assert "| voc20-512-B1 | forward | float32 | zegclip | zs3fast | 1200 | 1200 - 1200 | 1.20 |" in after
    assert "| voc20-512-B1 | forward | float32 | clip_rc | zs3fast | 1800 | 1800 - 1800 | 1.20 |" in after
    assert "| voc20-512-B1 | forward | zegclip | zs3fast | 1 | 2 | 3 | 1024 | 3.25 |" in after
    assert (
        "| coco171-512-B1 | forward | clip_rc M=256 | official eager |  |  |  | does not fit in 18.0 GiB |  |" in after
    )
    assert "Measured on Some CPU, 2 threads (AVX2); torch 2.10; commit 0123456789ab-dirty." in after
    assert "old" not in after
    assert report.fill(after, tmp_path) == after


def test_counts_have_tables_of_their_own():
    described = {"device": "Some GPU", "versions": {"torch": "2.10"}, "commit": "0123456789abcdef"}
    shape = {"described": described, "shape": "voc20-512"}
    rows = [
        harness.row("zegclip", "zs3fast", timing=None, pass_="activations", peak_bytes=3 * 2**20, **shape),
        harness.row("zegclip", "zs3fast", timing=None, pass_="largest batch", peak_bytes=2**30, largest_batch=7,
                    budget_gib=8.0, **shape),
        harness.row("tiny", "int8", timing=None, pass_="scores", pacc=50.0, miou=30.5, hiou=20.25, agreement=99.5,
                    **shape),
    ]  # fmt: skip
    text = report.render(rows)
    assert "| backend | MiB an image |" in text
    assert "| voc20-512 | activations | float32 | zegclip | zs3fast | 3 |" in text
    assert "| backend | images | in GiB | peak MiB |" in text
    assert "| voc20-512 | largest batch | float32 | zegclip | zs3fast | 7 | 8 | 1024 |" in text
    assert "| backend | pAcc | mIoU | hIoU | same labels, % |" in text
    assert "| voc20-512 | scores | float32 | tiny | int8 | 50 | 30.5 | 20.2 | 99.5 |" in text
    assert text.count("| peak MiB |") == 1 and "median" not in text


def test_loads_show_what_their_clients_saw():
    described = {"device": "Some CPU", "versions": {"torch": "2.10"}, "commit": "0123456789abcdef"}
    times = Timing([0.1] * 98 + [0.2] * 2)
    served = {"images_per_second": 40.0, "of_alone": 0.8, "resident_before_mib": 1000.0, "resident_after_mib": 1001.0}
    rows = [
        harness.row("tiny", "serve", "4 x 25", times, pass_="serve", described=described, **served),
        harness.row("tiny", "alone", "4 x 25", times, pass_="serve", described=described, images_per_second=50.0),
        harness.row("tiny", "2 actors", "20 images", times, pass_="bulk", described=described, of_plain=1.75),
    ]
    text = report.render(rows)
    assert "| requests/s | of alone | p50 ms | p99 ms | MiB before | MiB after |" in text
    assert "| 4 x 25 | serve | float32 | tiny | serve | 40 | 0.8 | 100 | 200 | 1000 | 1001 |" in text
    assert "| 4 x 25 | serve | float32 | tiny | alone | 50 |  | 100 | 200 |  |  |" in text
    assert "| 20 images | bulk | float32 | tiny | 2 actors |  | 1.75 |  |" in text


def test_times_stand_beside_those_of_zs3fast():
    described = {"device": "Some GPU", "versions": {"torch": "2.10"}, "commit": "0123456789abcdef"}

    def row(backend: str, seconds: float, shape: str = "voc20-512") -> dict:
        return harness.row("an_op", backend, shape, Timing([seconds]), described=described)

    text = report.render(
        [row("official eager", 0.3), row("official eager", 0.3, "coco171-512"), row("zs3fast (auto)", 0.002)]
        + [row("layer: joint", 0.5), row("layer: sdpa + zs3fast", 0.4)]
    )
    assert "| p20 - p80 ms | / zs3fast |" in text
    assert "| voc20-512 | forward | float32 | an_op | official eager | 300 | 300 - 300 | 150 |" in text
    assert "| coco171-512 | forward | float32 | an_op | official eager | 300 | 300 - 300 |  |" in text
    assert "| voc20-512 | forward | float32 | an_op | layer: joint | 500 | 500 - 500 | 1.25 |" in text
    assert "/ zs3fast" not in report.render([row("float32", 0.3), row("int8", 0.2)])


def test_a_missing_results_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="bench:nowhere/models"):
        report.fill("<!-- bench:nowhere/models -->\n<!-- /bench -->", tmp_path)


def test_kept_results_are_whole():
    for path in harness.RESULTS.glob("*-*/*.json"):
        rows = json.loads(path.read_text())["rows"]
        assert rows, path
        assert {r["commit"] for r in rows}, path
        assert all(r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"] for r in rows if r["rounds"]), path
        assert report.render(rows)
