"""Every script in bench/ops runs, checks its contenders and prints their rows, on a shape that measures nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "bench" / "ops").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs(script: Path) -> None:
    names = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=300).stdout
    slow = [
        name for name in ("official compiled", "dense compiled", "addmm compiled", "flex compiled") if name in names
    ]
    slow = ["flex compiled + matmul" if s == "flex compiled" and "flex compiled + matmul" in names else s for s in slow]
    command = [sys.executable, script, "tiny", "--rounds", "1", "--no-peaks", "--threads", "1", "--skip", *slow]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "zs3fast (auto)" in result.stdout and " ms" in result.stdout
