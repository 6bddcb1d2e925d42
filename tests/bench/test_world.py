"""The table of the procedural world: mean and spread of seeds, from the results file alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import world
from zs3fast.data.world import VERSION
from zs3fast.training.config import load_config


def test_the_table_shows_mean_and_spread(tmp_path: Path) -> None:
    rows = [
        {"variant": "zegclip", "seed": seed, "pAcc": 50.0 + seed, "mIoU(S)": 40.0, "mIoU(U)": 30.0, "hIoU": 34.0}
        for seed in (0, 1, 2)
    ]
    rows.append({"variant": "clip", "seed": 0, "pAcc": 20.0, "mIoU(S)": 5.0, "mIoU(U)": 6.0, "hIoU": 5.5})
    path = tmp_path / "world.json"
    path.write_text(json.dumps({"world": VERSION, "rows": rows}))
    text = world.fill("before\n<!-- world -->\nold\n<!-- /world -->\nafter\n", path)
    assert "| ZegCLIP | 51.0 ± 1.0 | 40.0 ± 0.0 | 30.0 ± 0.0 | 34.0 ± 0.0 | 3 |" in text
    assert "(maskclip) | 20.0 | 5.0 | 6.0 | 5.5 | 1 |" in text and "old" not in text
    path.write_text(json.dumps({"world": VERSION + 1, "rows": rows}))
    assert "ZegCLIP" not in world.fill("<!-- world -->\n<!-- /world -->\n", path), "another world's scores"


@pytest.mark.parametrize("name", world.VARIANTS)
def test_variants_are_settings_that_exist(name: str, tmp_path: Path) -> None:
    variant = world.VARIANTS[name]
    if variant.method is None:
        return
    lines = [line.replace("CODES", f"'{tmp_path}/codes.npy'") for line in variant.overrides]
    config = load_config(f"{variant.method}_world", lines)
    assert config.method == variant.method and config.setting == variant.setting
    assert variant.start is None or world.VARIANTS[variant.start].method == variant.method


def test_codes_are_orthogonal(tmp_path: Path) -> None:
    codes = np.load(world.class_codes(tmp_path))
    np.testing.assert_allclose(codes @ codes.T, np.eye(len(codes)), atol=1e-5)


def test_unknown_variants_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        world.main(["zegclipp"])
    assert "unknown variants: zegclipp" in capsys.readouterr().err
