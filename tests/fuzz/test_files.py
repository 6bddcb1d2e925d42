"""1,000 damaged files (`pytest -m fuzz`), and a fixed, short share of them in every run of the suite."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(seed: int, count: int, folder: Path) -> None:
    """In a process of its own, which may die, or take all memory."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.damaged", str(seed), str(count), str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    print(result.stdout[-2000:])
    assert result.returncode == 0, f"exit {result.returncode}: {result.stdout[-1000:]}{result.stderr[-4000:]}"


def test_some_damaged_files(tmp_path: Path) -> None:
    run(0, 81, tmp_path)


@pytest.mark.fuzz
def test_a_thousand_damaged_files(tmp_path: Path) -> None:
    """By a new seed each time, which is printed; ZS3FAST_FUZZ_SEED repeats it."""
    seed = int(os.environ.get("ZS3FAST_FUZZ_SEED") or secrets.randbits(32))
    print(f"ZS3FAST_FUZZ_SEED={seed}")
    run(seed, 1000, tmp_path)
