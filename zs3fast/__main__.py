"""`python -m zs3fast` is the `zs3fast` command."""

from __future__ import annotations

import sys


def main() -> None:
    """The command; an interrupt while its libraries are imported ends it like one later on."""
    try:
        from zs3fast.cli import app

        app(prog_name="zs3fast")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
