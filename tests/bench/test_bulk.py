"""The benchmark of bulk runs runs end to end, and refuses what would give no rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra [ray] is absent")
pytest.importorskip("pycocotools", reason="the extra [ray] is absent")

from bench import report  # noqa: E402
from bench.bulk import main  # noqa: E402


def test_too_few_images_for_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--images", "5"], ["--images", "20", "--shard-rows", "10"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "--images: expected at least 6 shards' rows" in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    out = tmp_path / "bulk.json"
    rows = main(["--images", "12", "--side", "32", "--actors", "2", "--rounds", "1", "--json", str(out)])
    assert [row["backend"] for row in rows] == ["plain loop", "2 actors"]
    assert all(row["images_per_second"] > 0 for row in rows) and rows[1]["first_shard_s"] > 0
    memory = main(["--memory", "8", "16", "--side", "32", "--json", str(out)])
    assert [row["images"] for row in memory] == [8] * 3 + [16] * 3 + [100_000] * 3
    assert {row["backend"] for row in memory[-3:]} == {
        f"{kind}, extrapolated" for kind in ("driver", "largest actor", "all processes")
    }
    assert all(row["peak_mib"] > 50 for row in memory[:6])
    assert json.loads(out.read_text())["rows"] == rows + memory
    text = report.render(rows + memory)
    assert "of the plain loop" in text and "| images | peak MiB |" in text
