"""The README is a promise: its snippet runs, its commands and variables exist, its tables are the results files'."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_module_snippet_runs() -> None:
    (code,) = re.findall(r"<!-- snippet -->\n```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["labels"].shape == (1, 512, 512) and scope["out"].mask_logits.shape == (1, 15, 32, 32)
    assert set(scope["losses"]) == {"loss_mask", "loss_dice", "loss_trusty", "loss"}


def test_every_variable_has_a_row() -> None:
    sources = [*ROOT.glob("zs3fast/**/*.py"), *ROOT.glob("tests/**/*.py"), ROOT / "setup.py"]
    read = re.compile(r"""(?:environ(?:\.get)?[\[(]|choice\(|getenv\()["'](ZS3FAST_[A-Z_]+)["']""")
    used = {name for path in sources for name in read.findall(path.read_text())}
    assert len(used) >= 6
    rows = "\n".join(line for line in README.splitlines() if line.startswith("| `ZS3FAST_"))
    assert {name for name in used if f"`{name}`" not in rows} == set()


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"zs3fast (segment|info|convert|eval|train|data|bench|demo)\b", README)))
)
def test_commands_exist(command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "zs3fast", command, "--help"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_tables_are_the_results_files() -> None:
    assert report.BLOCK.search(README), "no table of measured numbers"
    assert report.fill(README) == README


def test_pictures_exist() -> None:
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
