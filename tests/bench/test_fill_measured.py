"""zs3fast/ops/_measured.py is filled from rows: the smallest ratio counts, and only what both backends ran."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from bench import fill_measured, harness


def row(op: str, backend: str, shape: str, ms: float, device: str = "cuda", **more: Any) -> dict[str, Any]:
    """A row as `harness.row` makes it: the device by its own name, CUDA among the versions where that ran."""
    versions = {"torch": "2.14.1"} | ({"cuda": "13.0"} if device == "cuda" else {})
    return harness.row(op, f"zs3fast ({backend})", shape, harness.Timing([ms / 1e3], gpu=more or None),
                       described={"device": "NVIDIA H200", "versions": versions})  # fmt: skip


ROWS = [
    row("masks_to_labels", "triton", "a", 2.0),
    row("masks_to_labels", "cuda", "a", 1.0),
    row("masks_to_labels", "triton", "b", 3.0),
    row("masks_to_labels", "cuda", "b", 9.0, graph_ms=2.5),
    row("masks_to_bits", "triton", "a", 1.0),
    row("proposal_attention", "triton", "a", 9.0, "cpu"),
    row("proposal_attention", "cuda", "a", 1.0, "cpu"),
]


def test_smallest_ratio_of_what_both_ran(tmp_path: Path) -> None:
    results, file = tmp_path / "results.json", tmp_path / "_measured.py"
    results.write_text(json.dumps({"rows": ROWS}))
    fill_measured.main([str(results), "sm_90", "--source", "bench/results/x.json", "--file", str(file)])
    found = runpy.run_path(str(file))
    assert found["SPEEDUP_OVER_TRITON"]["masks_to_labels"]["sm_90"] == 1.2
    assert {op for op, of in found["SPEEDUP_OVER_TRITON"].items() if "sm_90" in of} == {"masks_to_labels"}
    assert found["faster_than_triton"]("masks_to_labels", "sm_90") and not found["faster_than_triton"](
        "masks_to_labels", "sm_80"
    )
    assert "bench/results/x.json" in file.read_text()


def test_nothing_measured_changes_nothing() -> None:
    text = fill_measured.FILE.read_text()
    assert fill_measured.filled(text, [], "sm_1", "nowhere") == text


def test_architecture_is_named_as_the_cards_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fill_measured.main([str(tmp_path), "h100"])
    assert "expected sm_80, sm_90, ..., got h100" in capsys.readouterr().err
