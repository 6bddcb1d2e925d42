"""`python -m zs3fast.train`, for torchrun: the same as `zs3fast train`."""

from __future__ import annotations

import typer

from zs3fast.training.command import EPILOG, train

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command(epilog=EPILOG)(train)
    app()
