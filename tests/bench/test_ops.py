"""Every script in bench/ops runs, checks its contenders and prints their rows, on a shape that measures nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import harness, op_script
from bench.op_shapes import NAMED, OPS, script
from zs3fast.ops._dispatch import registered


@pytest.mark.parametrize("op", OPS)
def test_script_runs(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    ours = script(op)
    slow = [name for name in ours.contenders if "compiled" in name]
    rows = op_script.run(ours, ["tiny", "--rounds", "1", "--no-peaks", *(["--skip", *slow] if slow else [])])
    assert {row["pass"] for row in rows} == set(ours.default_passes or ours.passes)
    out = capsys.readouterr().out
    assert "zs3fast (auto)" in out and " ms" in out


def test_a_script_is_a_command_that_updates_its_file(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    kept = harness.row("masks_to_bits", "zs3fast (auto)", "kept", harness.Timing([1e-3]))
    harness.write_results(path, [kept])
    file = harness.ROOT / "bench" / "ops" / "masks_to_bits.py"
    command = [sys.executable, file, "tiny", "--rounds", "1", "--skip", "official compiled", "official eager"]
    done = subprocess.run([*command, "--json", path, "--update"], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "zs3fast (auto)" in done.stdout and "MiB" in done.stdout  # peak memory, from a process of its own
    assert harness.read_results(path) == [kept]  # toy shapes are never kept


def test_named_shapes_are_the_scripts_own() -> None:
    files = {path.stem for path in (harness.ROOT / "bench" / "ops").glob("*.py")} - {"conftest", "test_ops"}
    assert set(OPS) == files <= set(registered())
    assert set(NAMED) == {
        "voc-512-b16", "coco171-512-b16", "ade847-640-l14", "maft-100prop", "clip-rc-m1024", "sclip-voc21", "tiny",
    }  # fmt: skip
    for shapes in NAMED.values():
        for op, shape in shapes.items():
            assert shape in script(op).shapes
    for op in OPS:
        ours = script(op)
        assert set(ours.large) <= set(ours.optional) <= set(ours.shapes) and any(op in ops for ops in NAMED.values())


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(harness.ROOT / "bench" / "ops")]
    command += ["--threads", "1", "--benchmark-min-rounds", "1", "--benchmark-max-time", "0.001"]
    command += ["--benchmark-storage", str(folder), *options]
    # pytest-benchmark does not measure in a process that shares a suite with others, and this one does not
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=harness.ROOT, env=alone)


def test_pytest_benchmark_saves_and_compares_on_one_device_only(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest bench/ops needs pytest-benchmark")
    only = ("--shapes", "tiny", "-k", "masks_to_labels and zs3fast")
    saved = run_pytest(tmp_path, *only, "--benchmark-save", "before")
    assert saved.returncode == 0, saved.stdout + saved.stderr
    (path,) = tmp_path.rglob("*before.json")
    content = json.loads(path.read_text())
    (benchmark,) = content["benchmarks"]
    assert content["machine_info"]["device"] == harness.device_name()
    assert benchmark["name"] == "test_op[masks_to_labels-tiny-forward-zs3fast]"
    assert benchmark["extra_info"] == {"shape": "tiny", "dtype": "float32", "backend": "auto"}
    content["machine_info"]["device"] = "another machine"
    path.write_text(json.dumps(content))
    refused = run_pytest(tmp_path, *only, "--benchmark-compare", "0001")
    assert refused.returncode != 0 and "measured on 'another machine'" in refused.stdout + refused.stderr


def test_shapes_too_large_for_a_cpu_say_so(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest bench/ops needs pytest-benchmark")
    done = run_pytest(tmp_path, "--shapes", "coco171-512-b16", "-k", "mask_loss")
    assert done.returncode == 0 and "--all runs it" in done.stdout, done.stdout + done.stderr
