"""The ClsCLIP benchmark: its contenders agree on classes and boxes, and the script runs. The baseline is tested with
the model (tests/models/test_clsclip.py)."""

from __future__ import annotations

import pytest
import torch

from bench import clsclip


@pytest.mark.parametrize("name", clsclip.SCRIPT.contenders)
def test_boxes_of_every_contender_are_the_plain_ones(name: str) -> None:
    ours, plain = clsclip.make_models(True, "cpu", torch.float32)
    text = torch.randn(4, ours.embed_dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    call, expect = clsclip.make_boxes_call(name, ours, plain, text, generator, [0, 2, 3])
    with torch.no_grad():
        got = call()
        clsclip.within_budget(name, got[[0, 2, 3]], expect())
    assert got.shape == (4, 375, 500) and (got.flatten(1).amax(1) > 0).all()


def test_script_runs(capsys: pytest.CaptureFixture[str]) -> None:
    rows = clsclip.main(["tiny", "--rounds", "1", "--no-peaks", "--threads", str(torch.get_num_threads())])
    assert [row["backend"] for row in rows] == ["plain", "one by one", "zs3fast (auto)"]
    assert "against plain: one by one" in capsys.readouterr().out
