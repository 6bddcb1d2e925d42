"""`zs3fast app`: help without the extra, what is missing by name, numbers that are no good."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zs3fast.cli import app

WITHOUT = """
import sys
for name in ("gradio", "ray", "fastapi", "starlette"):
    sys.modules[name] = None
from zs3fast.cli import app
app(sys.argv[1:])
"""


def run_without_extras(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("command", "option", "arguments", "missing"),
    [
        ("app", "--max-upload", [], "app needs gradio: pip install 'zs3fast[app]'"),
        ("serve", "--queued", ["--weights", "zs3fast-tiny"], "serve needs ray: pip install 'zs3fast[ray]'"),
    ],
)
def test_help_needs_no_extra_and_running_names_it(
    command: str, option: str, arguments: list[str], missing: str
) -> None:
    shown = run_without_extras(command, "--help")
    assert shown.returncode == 0 and option in shown.stdout, shown.stderr
    ran = run_without_extras(command, *arguments)
    assert ran.returncode == 2 and ran.stderr == f"error {missing}\n"


@pytest.mark.slow
def test_it_ends_when_it_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'zs3fast[app]'")
    for told in (signal.SIGTERM, signal.SIGINT):
        running = subprocess.Popen(
            [sys.executable, "-m", "zs3fast", "app"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        assert running.stdout is not None
        line = running.stdout.readline()
        assert line.startswith("zs3fast is at http://127.0.0.1:"), line
        assert [path.name[:12] for path in tmp_path.iterdir()] == ["zs3fast_app_"]
        running.send_signal(told)
        _, said = running.communicate(timeout=60)
        assert running.returncode == 0 and said == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "no-such-file"], "no-such-file"),
        (["--max-upload", "0"], "--max-upload: expected a number above 0, got 0"),
        (["--max-classes", "-3"], "--max-classes: expected a number above 0, got -3"),
        (["--dtype", "int3"], "--dtype: expected one of"),
    ],
)
def test_arguments_that_are_no_good(arguments: list[str], said: str) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'zs3fast[app]'")
    result = CliRunner().invoke(app, ["app", *arguments])
    assert result.exit_code == 2 and said in result.output and len(result.output.splitlines()) == 1, result.output
