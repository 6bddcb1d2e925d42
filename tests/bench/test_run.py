"""`python bench/run.py` runs end to end on a toy network."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from bench import contenders, harness, report, run


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_quick_run_end_to_end(tmp_path):
    path = tmp_path / "out" / "tiny.json"
    command = [
        sys.executable,
        str(harness.ROOT / "bench" / "run.py"),
        "--quick",
        "--tiny",
        "--models",
        *contenders.METHODS,
        "--threads",
        "1",
        "--json",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    timed = {(r["name"], r["backend"]) for r in rows}
    assert timed == {
        ("zegclip", "official eager"), ("zegclip", "zs3fast"), ("tagclip", "official eager"), ("tagclip", "zs3fast"),
        ("clip_rc", "official eager"), ("clip_rc", "zs3fast"),
        ("encoder", run.PRODUCTS), ("encoder", run.ATTENTION),
        ("encoder M=16", run.PRODUCTS), ("encoder M=16", run.ATTENTION),
    }  # fmt: skip
    for r in rows:
        assert r["rounds"] == 3 and r["p50_ms"] > 0
        assert (r["peak_mib"] is not None) == (not r["name"].startswith("encoder"))
        assert r["floor"] == ("encoder M=16" if r["name"] in ("clip_rc", "encoder M=16") else "encoder")
    assert "floor: products + attention" in done.stdout and "first call s" in done.stdout


def test_training_stages_and_comparison(tmp_path, capsys):
    path = tmp_path / "first.json"
    options = [
        "--quick",
        "--tiny",
        "--models",
        "tagclip",
        "clip_rc",
        "--regions",
        "4",
        "--skip",
        "probes",
        "--pass",
        "inference",
        "training",
        "--json",
    ]
    run.main([*options, str(path), "--stages"])
    assert "descriptor + decoder" in capsys.readouterr().out
    rows = run.main([*options, str(tmp_path / "second.json"), "--compare", str(path)])
    timed = {(r["name"], r["pass"]) for r in rows if not r["name"].startswith("encoder")}
    assert timed == {(n, p) for n in ("tagclip", "clip_rc M=4") for p in ("inference", "training")}
    assert "speed-up" in capsys.readouterr().out


def test_results_of_another_device_are_not_compared(tmp_path):
    path = tmp_path / "other.json"
    harness.write_results(path, [{"device": "another machine"}])
    with pytest.raises(SystemExit, match="another machine"):
        run.main(["--quick", "--tiny", "--json", str(tmp_path / "out.json"), "--compare", str(path)])


def test_memory_alone_says_what_does_not_fit_and_updates_its_file(tmp_path):
    path = tmp_path / "memory.json"
    options = ["--tiny", "--models", "clip_rc", "--classes", "20", "--pass", "training", "--probes-only", "--update"]
    options += ["--skip", "official", "--threads", "1", "--json", str(path)]
    run.main([*options, "--regions", "4", "16"])
    rows = {r["name"]: r for r in harness.read_results(path)}
    assert set(rows) == {"clip_rc M=4", "clip_rc"}
    assert all(r["rounds"] == 0 and r["peak_mib"] > r["call_mib"] > 0 and r["p50_ms"] is None for r in rows.values())
    run.main([*options, "--batch", "2048", "--memory-limit", "1.5"])
    wide = [r for r in harness.read_results(path) if r["batch"] == 2048]
    assert [(r["name"], r["outcome"], r["peak_mib"]) for r in wide] == [("clip_rc", "does not fit in 1.5 GiB", None)]
    run.main([*options, "--probe-timeout", "0.01"])
    rows = harness.read_results(path)
    assert {(r["name"], r["batch"]): r.get("outcome") for r in rows} == {
        ("clip_rc M=4", 1): None,
        ("clip_rc", 2048): "does not fit in 1.5 GiB",
        ("clip_rc", 1): "not done in 0.01 s",
    }
    rendered = report.render(rows)
    assert "| does not fit in 1.5 GiB |" in rendered and "median ms" not in rendered


@pytest.mark.parametrize("method", contenders.METHODS)
def test_wrong_weights_are_not_timed(method):
    setting = contenders.Setting(method, 20, regions=4).tiny()
    baseline = contenders.make_baseline(setting)
    ours = contenders.make_ours(setting, baseline.state_dict())
    contenders.check_inference("zs3fast", ours, baseline, setting)
    contenders.check_training("zs3fast", ours, baseline, setting)
    head = baseline.decode_head
    with torch.no_grad():
        if method == "clip_rc":
            head.recovery_decoder.linear_q_out.weight.mul_(1.01)
            with pytest.raises(harness.OverBudget, match="loss"):  # the recovery loss is compared too
                contenders.check_training("zs3fast", ours, baseline, setting)
        assert not any(m.training for m in (*baseline.modules(), *ours.modules()))
        (head.relationship_discriptor if method == "tagclip" else head).q_proj.weight.mul_(1.01)
    with pytest.raises(harness.OverBudget, match="mask_logits"):
        contenders.check_inference("zs3fast", ours, baseline, setting)
    with pytest.raises(harness.OverBudget, match="loss"):
        contenders.check_training("zs3fast", ours, baseline, setting)


def test_floor_counts_the_live_work():
    # spec: 0.60 patch embedding + 0.40 projection + 84.9 linears, and 1025 x 1035 x 64 x 12 x 12 x 2 of attention
    setting = contenders.Setting("zegclip", 20)
    linears = 12 * 1025 * 12 * 768 * 768
    ends = 1024 * 768 * 768 + 1025 * 768 * 512
    tiny = setting.tiny()
    floor = contenders.Floor(tiny, attention=True)
    live, width, keys = 17, 48, 17 + 10
    expected = 16 * 768 * width + live * width * 32 + 3 * (12 * live * width**2 + 2 * live * keys * width)
    assert floor.flops() == 2 * expected
    assert contenders.Floor(tiny, attention=False).flops() == 2 * (expected - 3 * 2 * live * keys * width)
    floor()
    assert torch.isfinite(floor.out).all()
    # CLIP-RC: M rows and 2 N + M live pairs more: every patch with its region, both ways, and regions with themselves
    regions = contenders.Floor(contenders.Setting("clip_rc", 20, regions=4).tiny(), attention=True)
    expected += 4 * width * 32 + 3 * (12 * 4 * width**2 + 2 * (2 * 16 + 4) * width)
    assert regions.flops() == 2 * expected
    regions()
    assert setting.patches == 1024 and (linears + ends) / 1e9 == pytest.approx(88.0, abs=0.1)
