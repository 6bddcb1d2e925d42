"""What reaches a terminal: no control characters, one line an error, the right exit code."""

from __future__ import annotations

import errno
import io
import os

import pytest
import typer
from rich.markup import escape
from rich.table import Table

from zs3fast.utils import console
from zs3fast.utils.console import SafeConsole, first_line, one_line_errors, printable
from zs3fast.utils.errors import CheckpointError, Zs3fastError

RAW = "\x1b]0;owned\x07\x1b[31mred\x1b[0m\r\x9b31m\u202egnp.exe\x08\x7f"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(console, "stderr", SafeConsole(file=file, soft_wrap=True, highlight=False))
    return file


def test_control_characters_are_spelt_out() -> None:
    assert printable("a\x1b[31mb") == "a\\x1b[31mb"
    assert printable(os.fsdecode(b"caf\xe9.jpg")) == "caf\\xe9.jpg"
    assert printable("é ł 猫 👩\u200d🚀\tx\ny") == "é ł 猫 👩\u200d🚀\tx\ny"
    assert printable("猫", "ascii") == "\\u732b"
    assert not set(printable(RAW)) & set("\x1b\x07\r\x9b\u202e\x08\x7f")


def test_nothing_that_is_printed_reaches_the_terminal_raw() -> None:
    file = io.StringIO()
    table = Table("name")
    table.add_row(escape(RAW))
    safe = SafeConsole(file=file, width=200)
    for thing in (escape(RAW), f"[red]failed[/] {escape(RAW)}", table):
        safe.print(thing)
    assert "owned" in file.getvalue()
    assert not set(file.getvalue()) & set("\x1b\x07\r\x9b\u202e\x08\x7f")


def test_names_that_no_encoding_takes_are_printed() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    SafeConsole(file=file).print("caf\udce9 猫")
    file.flush()
    assert file.buffer.getvalue() == b"caf\\xe9 \\u732b\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "a b"),
        (MemoryError(), "out of memory"),
        (FileNotFoundError(2, "No such file", "x\x1b[31m"), "x\\x1b[31m: No such file"),
        (OverflowError("too large"), "too large"),
        (CheckpointError("bad"), "bad"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_is_one_line(error: BaseException, line: str) -> None:
    assert first_line(error) == line


def test_a_long_message_keeps_its_ends() -> None:
    line = first_line(ValueError("photo.jpg: " + "x" * 14_000 + " the end"))
    assert len(line) <= 800 and line.startswith("photo.jpg: xxx") and line.endswith("xxx the end")


@pytest.mark.parametrize("error", [ValueError("a"), MemoryError(), OverflowError("a"), Zs3fastError("a"), OSError("a")])
def test_what_a_user_can_cause_is_an_exit_code(shown: io.StringIO, error: BaseException) -> None:
    with pytest.raises(typer.Exit) as caught, one_line_errors(2):
        raise error
    assert caught.value.exit_code == 2 and shown.getvalue().count("\n") == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EDQUOT])
def test_a_full_disk_is_nobodys_mistake(shown: io.StringIO, number: int) -> None:
    """It was 2 in `train`, where settings and run are one call, and 1 elsewhere."""
    with pytest.raises(typer.Exit) as caught, one_line_errors(2):
        raise OSError(number, os.strerror(number), "run/log.jsonl")
    assert caught.value.exit_code == 1 and shown.getvalue().startswith("error run/log.jsonl: ")


def test_a_mistake_of_ours_is_not_hidden() -> None:
    with pytest.raises(AttributeError), one_line_errors(2):
        raise AttributeError("ours")


def test_an_interrupt_ends_with_130_whatever_became_of_it(shown: io.StringIO) -> None:
    with pytest.raises(typer.Exit) as caught, one_line_errors(2):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    for wrapper in (ImportError("numpy.core.multiarray failed to import"), SystemError("a result with an error set")):
        with pytest.raises(typer.Exit) as caught, one_line_errors(2):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise wrapper  # noqa: B904 - as C code does, with the interrupt as its context
        assert caught.value.exit_code == 130
