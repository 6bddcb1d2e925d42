"""`python bench/run.py` runs end to end on a toy network."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import contenders, counting, end_to_end, floors, groups, harness, report, run, tables
from bench.setting import METHODS, ONE_STAGE, Setting, make_inputs
from zs3fast.inference import predictors as recipes

TINY = ["--quick", "--tiny", "--threads", "1"]


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_quick_run_of_every_method(tmp_path):
    path = tmp_path / "out" / "tiny.json"
    command = [sys.executable, str(harness.ROOT / "bench" / "run.py"), *TINY, "--models", *METHODS]
    done = subprocess.run([*command, "--skip", "probes", "--json", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    timed = {(r["name"], r["backend"]) for r in rows}
    encoders = {
        "zegclip": "encoder", "tagclip": "encoder", "clip_rc": "encoder M=16", "maft": "encoder maft",
        "clsclip": "encoder clsclip",
    }  # fmt: skip
    eager = {m: "plain eager" if m == "clsclip" else "official eager" for m in METHODS}
    assert timed == {
        *((m, eager[m]) for m in METHODS),
        *((m, "zs3fast") for m in METHODS),
        *((encoder, floor) for encoder in encoders.values() for floor in floors.NAMES),
    }
    for r in rows:
        assert r["rounds"] == 3 and 0 < r["p20_ms"] <= r["p50_ms"] <= r["p99_ms"]
        assert r["images_per_second"] == pytest.approx(1e3 / r["p50_ms"], rel=1e-2)
        assert r["floor"] == encoders.get(r["name"], r["name"])
        if "floor" not in r["backend"]:
            assert r["gmac"] > 0 and 0 < r["trainable"] < r["parameters"]
    for word in ("FPS", "/ products", "M par.", "trained", "GMAC", "peak MiB"):
        assert word in done.stdout, word


@pytest.mark.parametrize(
    ("method", "classes", "declared", "live"),
    [
        ("zegclip", 20, 13_821_184, 8_039_168),
        ("zegclip", 171, 14_650_624, 8_868_608),
        ("tagclip", 20, 11_720_448, 9_091_328),
    ],
)
def test_parameters_are_those_of_the_papers(method, classes, declared, live):
    """The published structure declares what it never uses; without that, TagCLIP trains more than ZegCLIP, not less."""
    setting = Setting(method, classes)
    baseline = contenders.make_baseline(setting)
    ours = contenders.make_ours(setting, baseline.state_dict())
    assert counting.parameters(baseline, method, ours=False)["trainable"] == declared
    assert counting.parameters(ours, method, ours=True)["trainable"] == live


def test_the_first_call_alone_is_counted():
    setting = Setting("clip_rc", 20, regions=4).tiny()
    baseline = contenders.make_baseline(setting)
    call = counting.Counted(contenders.make_call("official", "inference", setting, baseline), baseline)
    asking = [p.requires_grad for p in baseline.parameters()]
    first, gmac = call(), call.gmac
    assert gmac > 0 and torch.equal(call(), first) and call.gmac == gmac
    assert [p.requires_grad for p in baseline.parameters()] == asking and any(asking)


@pytest.mark.parametrize("method", [*ONE_STAGE, "clsclip"])
def test_nothing_of_the_published_structure_goes_uncounted(method):
    """torch's attention has a fused path that its counter does not see; tensors without values never take it."""
    setting = Setting(method, 20, regions=4).tiny()
    baseline = contenders.make_baseline(setting)
    call = counting.Counted(contenders.make_call("official", "inference", setting, baseline), baseline)
    call()
    with torch.device("meta"):
        shapes = contenders.make_baseline(setting, "meta").requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes.predict_labels(*make_inputs(setting, "meta"))
    assert call.gmac == round(counter.get_total_flops() / 2e9, 3) > 0


def test_quick_settings_are_small_and_whole():
    settings = groups.make_settings(run.parse_arguments(["--quick"]), 20, 1, "inference")
    assert {s.method for s in settings} == set(METHODS) and {s.image_size for s in settings} == {128}
    assert all((s.width, s.layers) == (768, 12) for s in settings)


def test_a_quick_run_keeps_the_models_of_one_floor_at_a_time(monkeypatch, tmp_path):
    """All of them at once took 9 GB."""
    alive, most = weakref.WeakSet(), 0

    def measure(contenders, **options):
        nonlocal most
        most = max(most, len(alive))
        return measured(contenders, **options)

    def make(setting, *rest):
        model = made(setting, *rest)
        alive.add(model)
        return model

    measured, made = harness.measure, contenders.make_baseline
    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(contenders, "make_baseline", make)
    rows = run.main([*TINY, "--skip", "probes", "zs3fast", "--json", str(tmp_path / "out.json")])
    assert most == 2 and not alive  # ZegCLIP and TagCLIP have one encoder
    names = [r["name"] for r in rows if "floor" not in r["backend"]]
    assert names == list(METHODS) and all("floor" in r["backend"] for r in rows[len(names) :])


def test_dtypes_and_backends_are_contenders_side_by_side(tmp_path, capsys):
    path = tmp_path / "out.json"
    options = ["--models", "tagclip", "--dtype", "float32", "bfloat16", "--backend", "auto", "reference", "cpp"]
    rows = run.main([*TINY, *options, "--skip", "floors", "probes", "--json", str(path)])
    found = {(r["backend"], r["dtype"]) for r in rows}
    expected = {("official eager", d) for d in ("float32", "bfloat16")}
    expected |= {(backend, d) for backend in ("zs3fast", "zs3fast (reference)") for d in ("float32", "bfloat16")}
    assert found - {("zs3fast (cpp)", "float32")} == expected  # the extension may not be built; it has no bfloat16
    assert "zs3fast (cpp) does not run here" in " ".join(capsys.readouterr().out.split())


def test_a_process_each_for_start_up_and_memory(tmp_path, capsys):
    options = ["--models", "clsclip", "--backend", "reference", "cuda", "--probes-only"]
    rows = run.main([*TINY, *options, "--json", str(tmp_path / "out.json")])
    assert [r["backend"] for r in rows] == ["plain eager", "zs3fast (reference)"]  # CUDA takes no CPU tensors
    assert all(r["peak_mib"] > r["call_mib"] > 0 and r["import_s"] > 0 and not r["rounds"] for r in rows)
    assert "first call s" in capsys.readouterr().out


def test_file_to_labels_with_stages_apart(tmp_path):
    path = tmp_path / "out.json"
    rows = run.main([*TINY, "--models", *ONE_STAGE, "--pass", "end-to-end", "--json", str(path)])
    assert [(r["name"], r["backend"]) for r in rows] == [
        (m, backend) for m in ONE_STAGE for backend in ("official eager", "zs3fast")
    ]
    for r in rows:
        assert set(r["stages"]) == {f"{stage}_ms" for stage in end_to_end.STAGES}
        assert all(ms > 0 for ms in r["stages"].values())
        assert sum(r["stages"].values()) < 3 * r["p99_ms"]
    assert "| decode ms | resize ms | model ms | labels ms |" in report.render(rows)


@pytest.mark.parametrize("method", ONE_STAGE)
def test_wrong_pipelines_are_not_timed(method, tmp_path, monkeypatch):
    setting = Setting(method, 20).tiny()
    baseline = contenders.make_baseline(setting)
    ours = contenders.make_ours(setting, baseline.state_dict())
    baseline.seen_offset = ours.seen_offset = 0.0  # else one unseen class of a random network wins everywhere
    segmenter = end_to_end.make_segmenter(ours, setting, "cpu")
    path = end_to_end.make_image(tmp_path)
    contender, clock = end_to_end.make_ours(segmenter, baseline, setting, path, "cpu")
    labels = contender.run()
    assert labels.shape == (375, 500) and len(set(labels.flatten().tolist())) > 1 and len(clock.calls) == 1
    contender.check(labels)
    means = (ours.pixel_mean, ours.pixel_std)
    official = end_to_end.make_official(baseline, baseline, setting, path, means, "cpu")[0].run()
    assert (official == labels).mean() > 0.98  # their canvases differ by the rounding of 8 bits
    with pytest.raises(harness.OverBudget, match="official score"):
        contender.check(labels[::-1].copy())
    prepare = recipes.prepare
    monkeypatch.setattr(recipes, "prepare", lambda *arguments: prepare(*arguments) + 0.1)
    with pytest.raises(harness.OverBudget, match="of 255 levels apart"):
        contender.check(labels)


def test_windows_are_those_of_the_segmenter():
    from zs3fast.labels.windows import sliding_windows

    for size in ((512, 512), (512, 683), (900, 512), (512, 1500)):
        assert end_to_end.window_corners(size, 512) == sliding_windows(size, (512, 512), (426, 426))


def test_compiled_baseline_takes_its_turn(monkeypatch, tmp_path):
    """What is compiled is the network and its scores; here by a backend that runs the captured graphs as they are."""
    captured = []

    def backend(graph, inputs):
        captured.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compile_, backend=backend))
    options = ["--models", "zegclip", "maft", "clsclip", "--compile", "--skip", "probes", "floors"]
    rows = run.main([*TINY, *options, "--json", str(tmp_path / "out.json")])
    assert [r["backend"] for r in rows] == [
        "official eager", "official compiled", "zs3fast",
        "official eager", "official compiled", "zs3fast",
        "plain eager", "plain compiled", "zs3fast",
    ]  # fmt: skip
    assert len(captured) >= 6


def test_training_stages_and_comparison(tmp_path, capsys):
    path = tmp_path / "first.json"
    options = [*TINY, "--models", "tagclip", "clip_rc", "--regions", "4", "--skip", "probes"]
    options += ["--pass", "inference", "training", "--json"]
    run.main([*options, str(path), "--stages"])
    assert "descriptor + decoder" in capsys.readouterr().out
    rows = run.main([*options, str(tmp_path / "second.json"), "--compare", str(path)])
    timed = {(r["name"], r["pass"]) for r in rows if not r["name"].startswith("encoder")}
    assert timed == {(n, p) for n in ("tagclip", "clip_rc M=4") for p in ("inference", "training")}
    out = capsys.readouterr().out
    assert "speed-up" in out and "bench/training.py largest" in out


def test_comparison_prints_before_over_now(capsys):
    row = {"name": "zegclip", "backend": "zs3fast", "shape": "s", "dtype": "float32", "pass": "inference", "rounds": 3}
    row |= {"classes": 20, "batch": 1, "images_per_second": 10.0, "floor": "encoder", "device": "d"}
    row |= {"versions": {"torch": "2"}, **{f"p{p}_ms": 100.0 for p in (20, 50, 80, 99)}}
    tables.show(run.console, [row, {**row, "name": "tagclip"}], [{**row, "p50_ms": 250.0}])
    lines = capsys.readouterr().out.splitlines()
    (ours,) = [line for line in lines if "zegclip" in line]
    assert [cell.strip() for cell in ours.split("│")[-3:-1]] == ["250.0", "2.50"]
    (new,) = [line for line in lines if "tagclip" in line]
    assert [cell.strip() for cell in new.split("│")[-3:-1]] == ["-", "-"]


def test_impossible_requests_are_refused(capsys):
    for options, message in (
        (["--classes", "0"], "--classes: expected at least 1, got 0"),
        (["--pass", "training", "--classes", "847"], "up to 255 classes, got 847"),
        (["--models", "maft", "--pass", "end-to-end"], "compared for zegclip, tagclip, clip_rc"),
    ):
        with pytest.raises(SystemExit):
            run.parse_arguments(options)
        assert message in capsys.readouterr().err


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


@pytest.mark.parametrize("method", METHODS)
def test_wrong_weights_are_not_timed(method):
    setting = Setting(method, 20, regions=4).tiny()
    baseline = contenders.make_baseline(setting)
    ours = contenders.make_ours(setting, baseline.state_dict())
    contenders.check_inference("zs3fast", ours, baseline, setting)
    with torch.no_grad():
        if method in ONE_STAGE:
            check_wrong_training(method, ours, baseline, setting)
            head = baseline.decode_head
            (head.relationship_discriptor if method == "tagclip" else head).q_proj.weight.mul_(1.01)
        else:
            (baseline.IPCLIP.proj if method == "maft" else baseline.decoder.head.weight)[0].mul_(1.01)
    with pytest.raises(harness.OverBudget, match="mask_logits"):
        contenders.check_inference("zs3fast", ours, baseline, setting)
    if method in ONE_STAGE:
        with pytest.raises(harness.OverBudget, match="loss"):
            contenders.check_training("zs3fast", ours, baseline, setting)


def check_wrong_training(method, ours, baseline, setting):
    contenders.check_training("zs3fast", ours, baseline, setting)
    if method == "clip_rc":
        baseline.decode_head.recovery_decoder.linear_q_out.weight.mul_(1.01)
        with pytest.raises(harness.OverBudget, match="loss"):  # the recovery loss is compared too
            contenders.check_training("zs3fast", ours, baseline, setting)
    assert not any(m.training for m in (*baseline.modules(), *ours.modules()))


def test_wrong_labels_are_not_timed(monkeypatch):
    setting = Setting("zegclip", 20).tiny()
    baseline = contenders.make_baseline(setting)
    ours = contenders.make_ours(setting, baseline.state_dict())
    right = ours.predict_labels
    monkeypatch.setattr(ours, "predict_labels", lambda out, size: (right(out, size) + 1) % 20)
    for dtype in ("float32", "bfloat16"):
        setting = replace(setting, dtype=dtype)
        with pytest.raises(harness.OverBudget, match="labels"):
            contenders.check_inference(
                "zs3fast", ours.to(setting.torch_dtype), baseline.to(setting.torch_dtype), setting
            )


@pytest.mark.parametrize("method", METHODS)
def test_half_types_are_held_to_the_official_structure_s_own_error(method):
    setting = replace(Setting(method, 20, regions=4).tiny(), dtype="bfloat16")
    baseline = contenders.make_baseline(setting)
    ours = contenders.make_ours(setting, baseline.state_dict())
    assert next(ours.parameters()).dtype == next(baseline.parameters()).dtype == torch.bfloat16
    contenders.check_inference("zs3fast", ours, baseline, setting)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter) * parameter.abs().mean())
            parameter.mul_(1.05)
    with pytest.raises(harness.OverBudget, match="mask_logits"):
        contenders.check_inference("zs3fast", ours, baseline, setting)


def test_settings_are_the_published_ones():
    assert [Setting(m, 20).image_size for m in METHODS] == [512, 512, 512, 480, 352]
    assert [Setting("zegclip", c).prompts for c in (20, 59, 171)] == [10, 100, 100]
    assert Setting("zegclip", 20).seen == list(range(15))
    assert len(Setting("zegclip", 171).seen) == 156 and 19 not in Setting("zegclip", 171).seen
    images, text, proposals = make_inputs(Setting("maft", 20, batch=2).tiny())
    assert images.shape == (2, 3, 64, 64) and proposals.mask_logits.shape == (2, 5, 16, 16)
    covered = proposals.mask_logits.sigmoid().mean()
    assert 0.02 < covered < 0.2


def test_clsclip_runs_at_many_classes_only_by_name():
    def methods(argv, classes):
        return {s.method for s in groups.make_settings(run.parse_arguments(argv), classes, 1, "inference")}

    assert methods([], 20) == set(METHODS) and methods([], 171) == set(METHODS) - {"clsclip"}
    assert methods(["--models", "clsclip"], 171) == {"clsclip"}


def test_floor_runs_on_the_fastest_kernel():
    assert floors.fastest([lambda: time.sleep(0.02), lambda: None]) == 1
    assert floors.fastest([lambda: None, lambda: time.sleep(0.02)]) == 0
    floor = floors.Floor(Setting("zegclip", 20).tiny(), attention=True)
    assert set(floor.fastest) == set(floor.works)
    for work in floor.fastest:  # the kernels of a work do the same
        if isinstance(work, floors.Linear):
            by_torch, by_ours = (call() for call in floor._linear(work))
            torch.testing.assert_close(by_ours, by_torch, atol=1e-4, rtol=1e-4)


def test_floor_counts_the_live_work():
    # spec: 0.60 patch embedding + 0.40 projection + 84.9 linears, and 1025 x 1035 x 64 x 12 x 12 x 2 of attention
    setting = Setting("zegclip", 20)
    linears = 12 * 1025 * 12 * 768 * 768
    ends = 1024 * 768 * 768 + 1025 * 768 * 512
    tiny = setting.tiny()
    floor = floors.Floor(tiny, attention=True)
    live, width, keys = 17, 48, 17 + 10
    expected = 16 * 768 * width + live * width * 32 + 3 * (12 * live * width**2 + 2 * live * keys * width)
    assert floor.flops() == 2 * expected
    assert floors.Floor(tiny, attention=False).flops() == 2 * (expected - 3 * 2 * live * keys * width)
    floor()
    assert all(torch.isfinite(buffer).all() for buffer in floor.buffers.values())
    # CLIP-RC: M rows and 2 N + M live pairs more: every patch with its region, both ways, and regions with themselves
    regions = floors.Floor(Setting("clip_rc", 20, regions=4).tiny(), attention=True)
    expected += 4 * width * 32 + 3 * (12 * 4 * width**2 + 2 * (2 * 16 + 4) * width)
    assert regions.flops() == 2 * expected
    regions()
    # MAFT: proposals join the patches after the first layers, and alone need the last one's output
    maft = floors.Floor(Setting("maft", 20).tiny(), attention=True)
    proposals, joined = 5, 16 + 5
    rows = live * 12 * width**2 + joined * 12 * width**2 + width**2 * (2 * joined + proposals + 9 * proposals)
    work = 16 * 768 * width + proposals * width * 32 + rows + 2 * width * (live * live + 16 * 16)
    assert maft.flops() == 2 * work
    # ClsCLIP: two layers and the third one's projections once, everything after a class
    clsclip = floors.Floor(Setting("clsclip", 7).tiny(), attention=False)
    rows = 2 * live * 12 * width**2 + 16 * 3 * width**2 + 7 * live * 9 * width**2 + 3 * 7 * live * 12 * width**2
    assert clsclip.flops() == 2 * (16 * 768 * width + rows)
    maft(), clsclip()
    assert floors.BytesFloor(tiny, 1000).bytes == 4000 + 4 * 3 * 64**2 + 8 * 64**2
    assert setting.patches == 1024 and (linears + ends) / 1e9 == pytest.approx(88.0, abs=0.1)
