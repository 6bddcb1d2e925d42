"""What the whole `segment` command holds of a large photo: its pixels, a score and a label each, and strips of work."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RUN = """
import re, sys
from zs3fast.cli import app
app(sys.argv[1:], standalone_mode=False)
print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def peak(photo: Path, *options: str) -> int:
    """Bytes that the command had at most."""
    arguments = ["segment", str(photo), "-w", "zs3fast-tiny", "-c", "red circle, sky", "-o", str(photo.parent / "out")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments, *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"peak (\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]) * 1024


def photo(side: int) -> Image.Image:
    few = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    return Image.fromarray(few).resize((side, side), Image.Resampling.BICUBIC)


def test_bytes_of_a_pixel(tmp_path: Path) -> None:
    """3 of the pixels, 4 of the score, 1 of the label; what Pillow decodes, turned by EXIF here, is gone by then."""
    exif, sizes = Image.Exif(), {}
    exif[0x0112] = 6
    for side in (60, 3000):
        photo(side).save(tmp_path / "x.jpg", exif=exif.tobytes())
        sizes[side] = peak(tmp_path / "x.jpg")
    assert sizes[3000] - sizes[60] < 10 * 3000**2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("x.png", "RGB"), ("x.png", "RGBA"), ("x.png", "P"), ("x.jpg", "RGB")])
def test_36_megapixels_under_a_gigabyte(tmp_path: Path, name: str, mode: str) -> None:
    photo(6000).convert(mode).save(tmp_path / name, compress_level=1)
    assert peak(tmp_path / name) < 10**9
