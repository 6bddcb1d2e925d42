"""What the commands share: two consoles, and errors a user can cause as one line and an exit code.

A command ends with 0: all is done; 1: it went wrong on the way, for some of the images, or because a disk is full; 2:
what was asked for is wrong (an option, a file that was handed in) or cannot be had here; 130: interrupted.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import inspect
import logging
import os
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from zs3fast.utils.errors import Zs3fastError

T = TypeVar("T")
USAGE_ERROR, RUN_ERROR, INTERRUPTED = 2, 1, 130  # 128 + SIGINT, as shells count
CROPS_HELP = "maft: classify proposals by a CLIP pass each, the baseline: mask, crop or mask_crop."
QUANTIZE_HELP = (
    "Run the image tower in 8 bits: int8, int8-weights or fp8. Needs zs3fast[quantize], int8 not on a CPU with "
    "AVX-512-VNNI."
)
USER_ERRORS = (Zs3fastError, ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError, MemoryError)
_LONGEST_MESSAGE = 800  # characters
# What functions of ours call their arguments, where commands have other names for the same.
_OTHER_NAMES = {
    "root": ("data",),
    "path": ("official", "out"),
    "name": ("dataset",),
    "name_or_path": ("weights",),
    "masks": ("proposer",),
    "size": ("height",),
    "dataset": ("set",),  # of `train`: data.name
}
_OF_THE_DISK = {errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EDQUOT}


def printable(text: str, encoding: str = "utf-8") -> str:
    """`text` with what a terminal would obey, or cannot show, spelt out: "\\x1b[31m" stays harmless.

    Control and formatting characters (escape sequences, carriage returns, right-to-left overrides), bytes of a file
    name that are not UTF-8, and what the terminal's own encoding lacks; line ends and tabs stay.
    """
    safe = "".join(character if _shown(character) else _spelt(character) for character in text)
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def _shown(character: str) -> bool:
    if character in "\n\t\u200d":  # zero-width joiners hold emoji together
        return True
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _spelt(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, as os.fsdecode carries it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class SafeConsole(Console):
    """A console on which no name of a file or a class is obeyed by the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich renders a string, be it printed, a table's cell or a status; without control characters."""
        try:
            safe = printable(text, self.encoding)
        except LookupError:  # an encoding that Python does not know
            safe = printable(text, "ascii")
        return super().render_str(safe, **options)


def _spell_out(record: logging.LogRecord) -> bool:
    """Names in the log's lines, which Python itself prints, are as harmless as in ours."""
    record.msg, record.args = printable(record.getMessage()), None
    return True


logging.getLogger("zs3fast").addFilter(_spell_out)
stderr = SafeConsole(stderr=True, soft_wrap=True, highlight=False)
stdout = SafeConsole(soft_wrap=True, highlight=False)


def takes(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Decorator of a command: its options on the command line are the fields of a frozen dataclass, which it is given.

    A field's annotation is what Typer reads: Annotated[type, typer.Option(...)].
    """
    hints = get_type_hints(options, include_extras=True)
    parameters = []
    for field in dataclasses.fields(options):  # type: ignore[arg-type]  # a dataclass, by the contract above
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name]))

    def wrap(command: Callable[[T], None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            command(options(**given))

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads of any function
        run.__annotations__ = hints
        return run

    return wrap


def progress_bar(console: Console = stdout, *, shown: bool = True, transient: bool = True) -> Progress:
    """The bar of every command: what is done, of how many, how long it takes; on a terminal alone."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=transient, disable=not (shown and console.is_terminal))


@contextmanager
def one_line_errors(code: int) -> Iterator[None]:
    """Turn the errors a user can cause into one line and an exit code; an interrupt ends with 130.

    A disk that is full or broken ends with 1 whatever `code` is: nothing was asked for wrongly.
    """
    try:
        yield
    except typer.Exit:  # a RuntimeError too: an inner block has said all
        raise
    except BaseException as error:
        if by_interrupt(error):
            stderr.print("[yellow]interrupted[/]")
            raise typer.Exit(INTERRUPTED) from None
        if not isinstance(error, USER_ERRORS):
            raise
        for line in getattr(error, "lines", None) or [
            as_option(first_line(error))
        ]:  # settings say all that is wrong at once
            stderr.print(f"[red]error[/] {escape(printable(line))}")
        of_the_disk = isinstance(error, OSError) and error.errno in _OF_THE_DISK
        raise typer.Exit(RUN_ERROR if of_the_disk else code) from None


def as_option(line: str) -> str:
    """A message about arguments, "trusted_on: ...", as one about the running command's options, "--trusted-on: ..."."""
    names, colon, rest = line.partition(": ")
    context = _click_context()
    if context is None or not colon:
        return line
    return f"{', '.join(_option(name, context) or name for name in names.split(', '))}: {rest}"


def _option(name: str, context: Any) -> str | None:
    """What the running command calls a function's argument; None: nothing."""
    params = context.command.params
    known = {param.name.rstrip("_"): param for param in params}
    known |= {option.lstrip("-").replace("-", "_"): param for param in params for option in param.opts}
    if context.params.get(name) is None and context.params.get(f"{name}_file") is not None:
        name = f"{name}_file"  # the same from a file
    param = next((known[one] for one in (name, *_OTHER_NAMES.get(name, ())) if one in known), None)
    if param is None:
        return None
    said: str = max(param.opts, key=len)
    return said if said.startswith("-") else str(param.metavar or said).upper()


def _click_context() -> Any:
    """The command that is running, as click knows it; newer Typers have a click of their own inside."""
    for module in ("typer._click.globals", "click.globals"):
        try:
            found = importlib.import_module(module).get_current_context(silent=True)
        except (ImportError, AttributeError):
            continue
        if found is not None:
            return found
    return None


def first_line(error: BaseException) -> str:
    """An error's message in one line of at most 800 characters; the middle of a longer one is left out."""
    if isinstance(error, MemoryError):
        text = f"out of memory{f' ({error})' if str(error) else ''}"
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    else:
        text = str(error)
    line = " ".join(printable(text).split()) or type(error).__name__
    if len(line) > _LONGEST_MESSAGE:
        line = f"{line[: _LONGEST_MESSAGE - 205]} ... {line[-200:]}"
    return line


def by_interrupt(error: BaseException | None) -> bool:
    """Whether an interrupt is behind an error: extension modules turn one that strikes while they load into others."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
