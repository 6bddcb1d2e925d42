"""`python -m zs3fast` is the `zs3fast` command."""

from __future__ import annotations

from zs3fast.cli import app

app(prog_name="zs3fast")
