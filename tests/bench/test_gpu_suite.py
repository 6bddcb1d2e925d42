"""bench/gpu_suite.sh: every part is accounted for, and none can take another with it. On the CPU."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import all_ops, clsclip, folder, gpu_suite, op_script, run, training
from bench.gpu_parts import CALLS, CARRIED, OPS, ORDER, ROOT, Part, make_parts
from bench.gpu_suite import Suite

NOT_ON_A_CPU = ("tests-cuda", "labels-cuda", "maft", "largest-batch")
SCRIPT = ROOT / "bench" / "gpu_suite.sh"
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def run_parts(tmp_path: Path, *parts: Part, budget: float = 3000.0, **limits: float) -> tuple[dict, str]:
    """The summary and the log of these parts."""
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    args = argparse.Namespace(out=out, parts=list(parts), limits=limits, budget=budget, dry_run=True)
    Suite(args, work).run()
    return json.loads((out / "summary.json").read_text()), (out / "log.txt").read_text()


def outcomes(summary: dict) -> dict[str, tuple[str, str]]:
    return {part["name"]: (part["status"], part["reason"]) for part in summary["parts"]}


def test_dry_run_goes_on_behind_parts_that_fail(tmp_path: Path) -> None:
    """A build that setup.py refuses and a part over its limit: the others run, and the summary names the two."""
    chosen = ["build", "environment", "tests", "models-bf16", "memcheck", "ops-bf16", "ops-fp32"]
    command = [
        str(SCRIPT),
        str(tmp_path),
        "--dry-run",
        "--only",
        *chosen,
        "--limit",
        "ops-fp32=0.2",
        "--budget",
        "3000",
    ]
    environment = ENVIRONMENT | {"ZS3FAST_CUDA": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000)
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 1, done.stdout + done.stderr + log
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = outcomes(summary)
    assert list(found) == [name for name in ORDER if name in chosen]
    assert {name: status for name, (status, _) in found.items()} == {
        "build": "failed", "environment": "passed", "tests": "passed", "models-bf16": "passed",
        "memcheck": "skipped", "ops-bf16": "passed", "ops-fp32": "failed",
    }, log  # fmt: skip
    assert found["build"][1] == "exit status 1; ZS3FAST_CUDA: expected auto, 0 or 1, got '2'"
    assert found["ops-fp32"][1] == "stopped after 0.2 s" and found["memcheck"][1].startswith("dry run")
    assert found["tests"][1].startswith("0 of ") and summary["failed_tests"] == []
    assert summary["failed"] == ["build", "ops-fp32"] and summary["missing"] == []
    assert summary["environment"]["versions"]["torch"] == torch.__version__
    assert done.stdout.splitlines()[-1].startswith("4 passed, 2 failed, 0 cut, 1 skipped")
    for line in ("failed  build ", "passed  tests ", "skipped memcheck "):
        assert line in done.stdout
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["source"] for row in rows} == {
        "models-bf16-zegclip",
        "ops-bf16/floor",
        "ops-bf16/relationship_descriptor",
    }
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"summary.json", "results.json", "log.txt", "tests.xml"}


def test_dry_run_covers_every_part() -> None:
    parts = make_parts(dry_run=True, archs=None)
    assert [p.name for p in parts] == [name for name in ORDER if name not in NOT_ON_A_CPU]
    assert {p.name for p in parts if p.skip} == {"memcheck", "racecheck", "counters"}


def test_crashes_hangs_and_what_is_missing(tmp_path: Path) -> None:
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)"
    )
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    summary, log = run_parts(
        tmp_path,
        Part("killed", [python("import os; os.kill(os.getpid(), 9)")], 300),
        Part("absent", [("/no/such/program",)], 300),
        Part("two", [python("raise SystemExit('the first is wrong')"), python("print('the second ran')")], 300),
        Part("hangs", [python(child)], 0.5),
        Part("deaf", [python(deaf)], 1.0),
        Part("needs", [python("")], 300, needs=("torch", "no_such_program!")),
        Part("fine", [python("import zs3fast; print('still here')")], 300),
    )
    assert outcomes(summary) == {
        "killed": ("failed", "exit status -9; it said nothing"),
        "absent": ("failed", "exit status 127; [Errno 2] No such file or directory: '/no/such/program'"),
        "two": ("failed", "1 of 2 commands failed; the second ran"),
        "hangs": ("failed", "stopped after 0.5 s"),
        "deaf": ("failed", "stopped after 1 s"),
        "needs": ("failed", "missing: no_such_program"),
        "fine": ("passed", ""),
    }
    assert summary["missing"] == ["no_such_program"] and "--- missing: no_such_program" in log
    assert "the first is wrong" in log and "still here" in log


def test_the_budget_cuts_and_leaves_out(tmp_path: Path) -> None:
    sleep = python("import time; time.sleep(60)")
    summary, _ = run_parts(
        tmp_path, Part("long", [sleep, sleep], 100, least=1.0), Part("late", [sleep], 100, least=30.0), budget=7.0
    )
    found = outcomes(summary)
    assert found["long"][0] == "cut" and "as the budget ended" in found["long"][1]
    assert found["late"] == ("skipped", "0 s of the budget left, takes 30 or more")
    assert summary["failed"] == []


def test_interrupted_tests_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest is given the time to write its report."""
    monkeypatch.setattr(gpu_suite, "GRACE", 60.0)  # on a machine with other work to do
    # A shell's background jobs ignore Ctrl-C and so would what they start; the suite has a handler, and so have we.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    file, report, log = tmp_path / "test_slow.py", tmp_path / "tests.xml", tmp_path / "log.txt"
    file.write_text(
        "import time\ndef test_a(): pass\ndef test_b(): assert 0, 'wrong sum'\ndef test_c(): time.sleep(999)\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", str(file), "--junitxml", str(report)]
    with log.open("wb") as output:
        environment = ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=output, env=environment, cwd=tmp_path, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    while "::test_c" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    gpu_suite.end(process)
    assert process.returncode is not None
    assert gpu_suite.count_tests(report, Part("tests", [], 1.0)) == "1 of 2 tests failed, 0 skipped"
    assert gpu_suite.failed_tests(report) == [
        {"test": "test_slow::test_b", "message": "AssertionError: wrong sum"},
    ]


def test_what_the_tools_say(tmp_path: Path) -> None:
    """ncu's refusal is no failure of ours; errors that compute-sanitizer found are."""
    refused = python("print('==ERROR== ERR_NVGPUCTRPERM - no permission'); raise SystemExit(1)")
    counted = python("print('========= ERROR SUMMARY: 3 errors'); print('x'); raise SystemExit(7)")
    summary, _ = run_parts(tmp_path, Part("counters", [refused], 300), Part("memcheck", [counted], 300))
    found = outcomes(summary)
    assert found["counters"] == ("skipped", "the performance counters may not be read on this machine")
    assert found["memcheck"] == ("failed", "exit status 7; ERROR SUMMARY: 3 errors")


def test_told_to_stop_it_writes_what_it_knows(tmp_path: Path) -> None:
    command = [str(SCRIPT), str(tmp_path), "--dry-run", "--only", "tests", "ops-bf16"]
    suite = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    log = tmp_path / "log.txt"
    while not log.exists() or "=== tests" not in log.read_text():
        assert suite.poll() is None
        time.sleep(0.05)
    suite.send_signal(signal.SIGTERM)
    assert suite.wait(300) == 1, suite.stdout.read()
    found = outcomes(json.loads((tmp_path / "summary.json").read_text()))
    assert found["tests"] == ("failed", "the suite was told to stop") and found["ops-bf16"][0] == "skipped"


PARSERS = {
    "bench/run.py": run.parse_arguments,
    "bench/training.py": training.parse_arguments,
    "bench/all_ops.py": all_ops.parse_arguments,
    "bench/clsclip.py": lambda argv: op_script.parse(clsclip.SCRIPT, argv),
    "bench/folder.py": folder.parse_arguments,
    **{
        f"bench/{script}": lambda argv, script=script: op_script.parse(all_ops.declared(ROOT / "bench" / script), argv)
        for script in ("maft.py", "ops/masks_to_labels.py")
    },
}
ON_A_GPU_ALONE = {"bench/maft.py", "bench/ops/masks_to_labels.py"}


@pytest.mark.parametrize("dry_run", [False, True], ids=["gpu", "dry"])
def test_every_benchmark_knows_its_options(dry_run: bool) -> None:
    """The commands for a GPU as their scripts read them: a renamed option shows here, not on a rented machine."""
    seen = set()
    for part in make_parts(dry_run, "90a"):
        for command in part.commands:
            if len(command) > 1 and command[1] in PARSERS:
                args = PARSERS[command[1]](list(command[2:]))
                assert args.device == ("cpu" if dry_run else "cuda")
                seen.add(command[1])
    assert seen == set(PARSERS) - (ON_A_GPU_ALONE if dry_run else set())


def test_commands_for_a_gpu() -> None:
    """Sanitizers and profiler watch our kernels only, and what they select exists."""
    from _pytest.mark.expression import Expression

    parts = {part.name: part for part in make_parts(dry_run=False, archs="90a")}
    assert list(parts) == ORDER
    assert parts["build"].environment["ZS3FAST_CUDA_ARCHS"] == "90a"
    assert sorted(ORDER) == sorted(name for names in CALLS.values() for name in names)
    assert sum(parts[name].limit for name in CALLS[1]) <= 540, "the first call is not cut"
    assert CALLS[1][-1] == "tests-cuda", "what may hang comes last"
    assert len(OPS) >= 8 and all(script.is_file() for script in all_ops.SCRIPTS.values())
    names = {
        "memcheck": "test_agrees_with_float64[mask_loss-tiny-bf16-triton-backward]",
        "racecheck": "test_agrees_with_float64[masks_to_labels:windows-tiny-fp32-triton-forward]",
        "counters": "test_agrees_with_float64[region_bridge_attention-M1024-bf16-triton-backward]",
    }
    for name, test in names.items():
        (command,) = parts[name].commands
        assert any(all(op in word for op in OPS) for word in command)
        selected = Expression.compile(command[command.index("-k") + 1])
        for backend, chosen in (("triton", True), ("reference", False)):
            words = test.replace("triton", backend).lower()
            assert selected.evaluate(lambda word, words=words, **_: word.lower() in words) == chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        gpu_suite.main([str(tmp_path / "out")])
    assert error.value.code == 2 and "no CUDA device answers nvidia-smi; --dry-run" in capsys.readouterr().err


def test_what_was_not_carried_stops_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written: time on a rented machine is short."""
    monkeypatch.setattr(gpu_suite, "architecture", lambda: "90a")
    monkeypatch.setitem(CARRIED, "no_such_module", "no-such-wheel")
    with pytest.raises(SystemExit) as error:
        gpu_suite.main([str(tmp_path / "out"), "--call", "1"])
    assert error.value.code == 2 and not (tmp_path / "out").exists()
    assert "not installed, and nothing is fetched here: no-such-wheel" in capsys.readouterr().err.replace("ftfy, ", "")


@pytest.mark.parametrize("call", [1, 2, 3])
def test_calls_divide_the_parts(tmp_path: Path, call: int) -> None:
    args = gpu_suite.parse_arguments([str(tmp_path), "--dry-run", "--call", str(call)])
    assert [part.name for part in args.parts] == [name for name in CALLS[call] if name not in NOT_ON_A_CPU]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "tets"], "PART: expected some of build, environment, tests"),
        (["--limit", "tests"], "--limit: expected PART=SECONDS, got tests"),
        (["--limit", "tests=soon"], "--limit: expected PART=SECONDS, got tests=soon"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main([str(tmp_path), "--dry-run", *options])
    assert message in capsys.readouterr().err
