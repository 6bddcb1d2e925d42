"""An interrupt ends the command with 130 and one word, whenever it comes: while Python still imports, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

STRIKES = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background

def strike():
    signal.raise_signal(signal.SIGINT)

def lost():
    class Final:
        def __del__(self):
            strike()
    Final()  # Python lets no error out of a finaliser

def in_exec():
    exec("signal.raise_signal(signal.SIGINT)")

def turned():
    try:
        strike()
    except KeyboardInterrupt:
        raise ImportError("initialization failed")

def swallowed():
    try:
        strike()
    except KeyboardInterrupt:
        pass
    raise ImportError("cannot load module more than once per process")  # NumPy, where PyTorch lost its interrupt

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == WHERE:
            sys.meta_path.remove(self)
            HOW()

sys.meta_path.insert(0, Finder())
from zs3fast.__main__ import main
sys.argv = ["zs3fast", *ARGUMENTS]
main()
"""


WHERE = ["typer", "rich.table", "zs3fast.inference.results", "numpy", "torch", "cv2"]
LOST = [(how, where) for how in ("lost", "in_exec", "turned") for where in ("typer", "numpy")]
LOST += [("swallowed", where) for where in ("zs3fast.inference.results", "torch", "cv2")]


@pytest.mark.parametrize(("how", "where"), [*(("strike", where) for where in WHERE), *LOST])
def test_an_interrupt_while_python_imports(tmp_path: Path, how: str, where: str) -> None:
    """Before and within a command, and where it is lost or turned into something else."""
    Image.new("RGB", (9, 8)).save(tmp_path / "x.png")
    arguments = ["segment", str(tmp_path / "x.png"), "-w", "zs3fast-tiny", "-c", "sky", "-o", str(tmp_path / "out")]
    code = STRIKES.replace("WHERE", repr(where)).replace("HOW", how).replace("ARGUMENTS", repr(arguments))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (130, "interrupted"), done.stderr
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr
    assert not list(tmp_path.glob("out/.*"))


def test_what_is_no_interrupt_stays(tmp_path: Path) -> None:
    """Exit codes, and an error of ours with its traceback."""
    for arguments, code in (["--version"], 0), (["segment", str(tmp_path / "none.png"), "-c", ""], 2):
        done = subprocess.run([sys.executable, "-m", "zs3fast", *arguments], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
