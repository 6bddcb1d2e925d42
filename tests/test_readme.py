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
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "bench" / "results" / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
MOST_BYTES = 20_480


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
    rows = "\n".join(
        line for line in (ROOT / "docs" / "ops.md").read_text().splitlines() if line.startswith("| `ZS3FAST_")
    )
    assert {name for name in used if f"`{name}`" not in rows} == set()


COMMANDS = "segment|info|convert|eval|train|data|demo|export|bulk|serve|app|figures"


@pytest.mark.parametrize(
    "command", sorted({name for page in PAGES for name in re.findall(rf"zs3fast ({COMMANDS})\b", page.read_text())})
)
def test_commands_exist(command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "zs3fast", command, "--help"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_the_results_files(page: Path) -> None:
    text = page.read_text()
    assert report.fill(text) == text, "run: python bench/report.py"


def test_a_newcomer_reads_it_to_the_end() -> None:
    assert len(README.encode()) <= MOST_BYTES
    first = re.search(r"```bash\n(.*?)```", README, re.DOTALL)
    assert first and first[1].startswith("zs3fast segment photo.jpg --classes ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\[[^]]*\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target
