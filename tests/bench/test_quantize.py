"""bench/quantize.py on a toy network: forms of a tower in turns, and scores of a saved model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import quantize
from tests.tiny_clip import CONFIG, text_state, tiny_clip
from zs3fast import create_model, weights
from zs3fast.data.world import CLASS_NAMES

pytest.importorskip("torchao", reason="needs torchao (pip install 'zs3fast[quantize]')")
THREADS = str(torch.get_num_threads())


@pytest.mark.parametrize("method", ["clip_rc", "maft"])
def test_towers_are_timed_in_turns(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = quantize.main(
        ["--tiny", "--models", method, "--rounds", "1", "--kinds", "int8", "fp8", "--threads", THREADS]
    )
    assert [row["backend"] for row in rows] == ["float32", "bfloat16", "int8", "int8 bfloat16"]
    assert rows[0]["relative_error"] == 0 and rows[0]["speed_up"] == 1
    assert all(1e-4 < row["relative_error"] < quantize.BUDGET and row["p50_ms"] > 0 for row in rows[1:])
    assert "fp8 does not run here: kind: expected a model on a CUDA GPU for fp8" in capsys.readouterr().out


def test_a_saved_model_is_scored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(
        "zegclip",
        clip=CONFIG,
        image_size=64,
        num_prompts=2,
        decoder_heads=4,
        class_names=list(CLASS_NAMES),
        seen=range(48),
    )
    path, out = tmp_path / "model.safetensors", tmp_path / "rows.json"
    weights.save(model, path, text_state(tiny_clip(), "text_encoder."))
    options = ["--weights", str(path), "--scenes", "2", "--kinds", "int8", "--json", str(out), "--threads", THREADS]
    rows = quantize.main(options)
    assert [(row["name"], row["backend"], row["scenes"]) for row in rows] == [
        ("zegclip world", "float32", 2),
        ("zegclip world", "int8", 2),
    ]
    assert rows[0]["agreement"] == 100 and rows[1]["agreement"] > 80
    assert all(0 <= row[name] <= 100 for row in rows for name in ("pacc", "miou", "agreement"))
    assert json.loads(out.read_text())["rows"] == json.loads(json.dumps(rows))
