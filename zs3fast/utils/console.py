"""What the commands share: two consoles, and errors a user can cause as one line and an exit code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

USAGE_ERROR, RUN_ERROR = 2, 1
CROPS_HELP = "maft: classify proposals by a CLIP pass each, the baseline: mask, crop or mask_crop."
QUANTIZE_HELP = "Run the image tower in 8 bits: int8, int8-weights or fp8; needs zs3fast[quantize]."
stderr = Console(stderr=True, soft_wrap=True, highlight=False)
stdout = Console(soft_wrap=True, highlight=False)


@contextmanager
def one_line_errors(code: int) -> Iterator[None]:
    """Turn the errors a user can cause into one line and an exit code."""
    try:
        yield
    except typer.Exit:  # a RuntimeError too: an inner block has said all
        raise
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        stderr.print(f"[red]error[/] {escape(first_line(error))}")
        raise typer.Exit(code) from None


def first_line(error: BaseException) -> str:
    """An error's message in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
