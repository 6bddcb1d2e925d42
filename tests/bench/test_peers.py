"""Other runtimes beside ours: checked as the official structure is, named where they do not run."""

from __future__ import annotations

import importlib.util

import pytest

from bench import contenders, groups, peers, run
from bench.setting import Setting

TINY = Setting("zegclip", 5).tiny()


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_peer_gives_the_official_logits_and_labels(name: str) -> None:
    pytest.importorskip(name)
    baseline = contenders.make_baseline(TINY)
    contenders.check_inference("official", peers.make_peer(name, baseline, TINY, 1), baseline, TINY)


def test_what_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = contenders.make_baseline(TINY)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(peers.PeerRefused, match=r"openvino: not installed \(pip install 'zs3fast\[bench\]'\)"):
        peers.make_peer("openvino", baseline, TINY, 1)
    args = run.parse_arguments(["--tiny", "--peers", "onnxruntime", "--threads", "1"])
    group = groups.Group()
    groups.add_peer(args, run.console, group, TINY, baseline, "onnxruntime")
    assert not group.entries and "onnxruntime: not installed" in capsys.readouterr().out
